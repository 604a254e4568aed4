"""Block-sparse prefill in plain torch: slow, right, on any device, for tests and for machines without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit_kernels.block_sparse_prefill.lists import BlockLists, expand

CHUNK_QUERIES = 1024


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention under a dense mask, computed in float32, or in float64 if the queries are.

    Args:
        q: [H, S, D].
        k: [G, T, D], G dividing H; `v` alike.
        mask: bool [1 or H, S, T], true where a query reads a key.
        scale: factor on the scores.
    Returns:
        Output [H, S, D] in the dtype of `q` and log-sum-exp [H, S] (natural logarithm, float32). A query that reads
        no key gives zeros and minus infinity.
    """
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[0] // k.shape[0]
    wide_k = k.to(kind).repeat_interleave(group, 0)
    wide_v = v.to(kind).repeat_interleave(group, 0)
    outs, sums = [], []
    for first in range(0, q.shape[1], CHUNK_QUERIES):
        rows = slice(first, first + CHUNK_QUERIES)
        scores = (q[:, rows].to(kind) @ wide_k.transpose(1, 2)) * scale
        scores = scores.masked_fill(~mask[:, rows], float("-inf"))
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        outs.append((weights @ wide_v).to(q.dtype))
        sums.append(lse.float())
    return torch.cat(outs, 1), torch.cat(sums, 1)


def prefill_reference(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, partials: Tensor, indices: Tensor,
    mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None, ends: Tensor | None,
    block_q: int, block_k: int, q_offset: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the kernels compute, from the same tensors; see `block_sparse_prefill`."""
    batch, heads, n_queries, _ = q.shape
    lists = (counts, partials, indices, mask_ids, masks, block_q, block_k)
    out = torch.zeros_like(q)
    lse = torch.full((batch, heads, n_queries), float("-inf"), dtype=torch.float32, device=q.device)
    if starts is None or ends is None:
        mask = expand(*lists, n_queries, k.shape[2], q_offset, causal)
        for b in range(batch):
            out[b], lse[b] = masked_attention(q[b], k[b], v[b], mask, scale)
        return out, lse
    for b, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        at = slice(start, end)
        # The lists are those of the longest sequence: position zero is the first token of each.
        mask = expand(*lists, n_queries, k.shape[2], q_offset, causal)[:, : end - start, : end - start]
        out[b, :, at], lse[b, :, at] = masked_attention(q[b, :, at], k[b, :, at], v[b, :, at], mask, scale)
    return out, lse


def reference(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float,
    starts: Tensor | None = None, ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`prefill_reference` for lists in one piece."""
    return prefill_reference(
        q, k, v, lists.counts, lists.partials, lists.indices, lists.mask_ids, lists.masks, starts, ends,
        lists.block_q, lists.block_k, lists.q_offset, lists.causal, scale,
    )  # fmt: skip
