"""Block-sparse prefill in plain torch: slow, right, on any device, for tests and for machines without a kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunekit_kernels.block_sparse_prefill.lists import BlockLists, expand, expand_biases

CHUNK_QUERIES = 1024


def _kind(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention under a dense mask, computed in float32, or in float64 if the queries are.

    Args:
        q: [H, S, D].
        k: [G, T, D], G dividing H; `v` alike.
        mask: bool [1 or H, S, T], true where a query reads a key.
        scale: factor on the scores.
        bias: float like `mask`, added to the scores.
    Returns:
        Output [H, S, D] in the dtype of `q` and log-sum-exp [H, S] (natural logarithm, float32). A query that reads
        no key gives zeros and minus infinity.
    """
    kind = _kind(q)
    group = q.shape[0] // k.shape[0]
    wide_k = k.to(kind).repeat_interleave(group, 0)
    wide_v = v.to(kind).repeat_interleave(group, 0)
    outs, sums = [], []
    for first in range(0, q.shape[1], CHUNK_QUERIES):
        rows = slice(first, first + CHUNK_QUERIES)
        scores = (q[:, rows].to(kind) @ wide_k.transpose(1, 2)) * scale
        if bias is not None:
            scores = scores + bias[:, rows].to(kind)
        scores = scores.masked_fill(~mask[:, rows], float("-inf"))
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        outs.append((weights @ wide_v).to(q.dtype))
        sums.append(lse.float())
    return torch.cat(outs, 1), torch.cat(sums, 1)


def masked_gradients(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor,
    scale: float, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `masked_attention` with respect to `q`, `k` and `v`, from its results and their gradients."""
    kind = _kind(q)
    group = q.shape[0] // k.shape[0]
    wide_k = k.to(kind).repeat_interleave(group, 0)
    wide_v = v.to(kind).repeat_interleave(group, 0)
    dq, dk, dv = torch.zeros_like(q, dtype=kind), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    for first in range(0, q.shape[1], CHUNK_QUERIES):
        rows = slice(first, first + CHUNK_QUERIES)
        mine, above = q[:, rows].to(kind), grad[:, rows].to(kind)
        scores = (mine @ wide_k.transpose(1, 2)) * scale
        if bias is not None:
            scores = scores + bias[:, rows].to(kind)
        sums = lse[:, rows].to(kind)
        scores = scores - sums.masked_fill(sums == float("-inf"), 0.0).unsqueeze(-1)
        weights = scores.masked_fill(~mask[:, rows], float("-inf")).exp()
        less = (above * out[:, rows].to(kind)).sum(-1) - grad_lse[:, rows].to(kind)
        inner = weights * (above @ wide_v.transpose(1, 2) - less.unsqueeze(-1)) * scale
        dq[:, rows] = inner @ wide_k
        dk += inner.transpose(1, 2) @ mine
        dv += weights.transpose(1, 2) @ above
    narrow = [t.unflatten(0, (k.shape[0], group)).sum(1) for t in (dk, dv)]
    return dq.to(q.dtype), narrow[0].to(k.dtype), narrow[1].to(v.dtype)


def _sequences(
    q: Tensor, k: Tensor, counts: Tensor, partials: Tensor, indices: Tensor, mask_ids: Tensor | None,
    masks: Tensor | None, starts: Tensor | None, ends: Tensor | None, biases: Tensor | None,
    block_q: int, block_k: int, q_offset: int, causal: bool,
) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:  # fmt: skip
    """Slots of queries and keys, mask and bias of each sequence of the batch."""
    lists = (counts, partials, indices, mask_ids, masks, block_q, block_k)
    mask = expand(*lists, q.shape[2], k.shape[2], q_offset, causal)
    bias = None
    if biases is not None:
        bias = expand_biases(biases, counts, indices, block_q, block_k, q.shape[2], k.shape[2])
    for b in range(q.shape[0]):
        if starts is None or ends is None:
            yield slice(0, q.shape[2]), slice(0, k.shape[2]), mask, bias
            continue
        start, end = int(starts[b]), int(ends[b])
        # The lists are those of the longest sequence: position zero is the first token of each.
        n = end - start
        yield slice(start, end), slice(start, end), mask[:, :n, :n], None if bias is None else bias[:, :n, :n]


def prefill_reference(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, partials: Tensor, indices: Tensor,
    mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None, ends: Tensor | None,
    block_q: int, block_k: int, q_offset: int, causal: bool, scale: float, biases: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the kernels compute, from the same tensors; see `block_sparse_prefill`."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    lists = (counts, partials, indices, mask_ids, masks, starts, ends, biases, block_q, block_k, q_offset, causal)
    for b, (rows, cols, mask, bias) in enumerate(_sequences(q, k, *lists)):
        out[b, :, rows], lse[b, :, rows] = masked_attention(
            q[b, :, rows], k[b, :, cols], v[b, :, cols], mask, scale, bias
        )
    return out, lse


def backward_reference(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, counts: Tensor,
    partials: Tensor, indices: Tensor, mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None,
    ends: Tensor | None, biases: Tensor | None, block_q: int, block_k: int, q_offset: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `prefill_reference` with respect to `q`, `k` and `v`."""
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    lists = (counts, partials, indices, mask_ids, masks, starts, ends, biases, block_q, block_k, q_offset, causal)
    for b, (rows, cols, mask, bias) in enumerate(_sequences(q, k, *lists)):
        dq[b, :, rows], dk[b, :, cols], dv[b, :, cols] = masked_gradients(
            grad[b, :, rows], grad_lse[b, :, rows], q[b, :, rows], k[b, :, cols], v[b, :, cols], out[b, :, rows],
            lse[b, :, rows], mask, scale, bias,
        )  # fmt: skip
    return dq, dk, dv


def reference(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float,
    starts: Tensor | None = None, ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`prefill_reference` for lists in one piece."""
    return prefill_reference(
        q, k, v, lists.counts, lists.partials, lists.indices, lists.mask_ids, lists.masks, starts, ends,
        lists.block_q, lists.block_k, lists.q_offset, lists.causal, scale, lists.biases,
    )  # fmt: skip
