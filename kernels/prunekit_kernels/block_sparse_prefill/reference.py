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
    out, sums = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for first in range(0, q.shape[1], CHUNK_QUERIES):
        rows = slice(first, first + CHUNK_QUERIES)
        scores = (q[:, rows].to(kind) @ wide_k.transpose(1, 2)) * scale
        if bias is not None:
            scores = scores + bias[:, rows].to(kind)
        scores = scores.masked_fill(~mask[:, rows], float("-inf"))
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        out[:, rows], sums[:, rows] = (weights @ wide_v).to(q.dtype), lse.float()
    return out, sums


def masked_gradients(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor,
    scale: float, bias: Tensor | None = None, gated: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `masked_attention` with respect to `q`, `k`, `v` and gates, from its results and their gradients.

    `gated`, bool [S, T], says which pairs the gate of their key counts for; the last result is [G, T].
    """
    kind = _kind(q)
    group = q.shape[0] // k.shape[0]
    wide_k = k.to(kind).repeat_interleave(group, 0)
    wide_v = v.to(kind).repeat_interleave(group, 0)
    dq, dk, dv = torch.zeros_like(q, dtype=kind), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    dgate = torch.zeros(wide_k.shape[:2], dtype=kind, device=q.device)
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
        inner = weights * (above @ wide_v.transpose(1, 2) - less.unsqueeze(-1))
        if gated is not None:
            dgate += (inner * gated[rows]).sum(1)
        inner = inner * scale
        dq[:, rows] = inner @ wide_k
        dk += inner.transpose(1, 2) @ mine
        dv += weights.transpose(1, 2) @ above
    narrow = [t.unflatten(0, (k.shape[0], group)).sum(1) for t in (dk, dv, dgate)]
    return dq.to(q.dtype), narrow[0].to(k.dtype), narrow[1].to(v.dtype), narrow[2].float()


def _sequences(
    q: Tensor, k: Tensor, counts: Tensor, partials: Tensor, indices: Tensor, mask_ids: Tensor | None,
    masks: Tensor | None, starts: Tensor | None, ends: Tensor | None, biases: Tensor | None,
    block_q: int, block_k: int, q_offset: int, causal: bool, gates: Tensor | None = None, free: int = 0,
) -> Iterator[tuple[int, slice, slice, Tensor, Tensor | None, Tensor | None]]:  # fmt: skip
    """Row of the batch, slots of queries and keys, mask, bias and gated pairs of each sequence."""
    lists = (counts, partials, indices, mask_ids, masks, block_q, block_k)
    n_queries, n_keys = q.shape[2], k.shape[2]
    if starts is not None and len(starts) != q.shape[0]:
        # Sequences one behind another: the lists are for the longest.
        n_queries = n_keys = counts.shape[1] * block_q
    mask = expand(*lists, n_queries, n_keys, q_offset, causal)
    bias, gated = None, None
    if biases is not None:
        bias = expand_biases(biases, counts, indices, block_q, block_k, n_queries, n_keys)
    if gates is not None:
        at_q = q_offset + torch.arange(n_queries, device=q.device)
        gated = at_q[:, None] - torch.arange(n_keys, device=q.device) >= free
    for b in range(q.shape[0] if starts is None else len(starts)):
        row = b if starts is None or len(starts) == q.shape[0] else 0
        rows, cols = slice(0, n_queries), slice(0, n_keys)
        if starts is not None and ends is not None:
            # The lists are those of the longest sequence: position zero is the first token of each.
            rows = cols = slice(int(starts[b]), int(ends[b]))
        n, m = rows.stop - rows.start, cols.stop - cols.start
        mine = None if gated is None else gated[:n, :m]
        added = None if bias is None else bias[:, :n, :m]
        if gates is not None and mine is not None:
            by_head = gates[row, :, cols].to(_kind(q)).repeat_interleave(q.shape[1] // k.shape[1], 0)
            gate = torch.where(mine, by_head[:, None, :], 0.0)
            added = gate if added is None else added + gate
        yield row, rows, cols, mask[:, :n, :m], added, mine


def prefill_reference(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, partials: Tensor, indices: Tensor,
    mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None, ends: Tensor | None,
    block_q: int, block_k: int, q_offset: int, causal: bool, scale: float, biases: Tensor | None = None,
    gates: Tensor | None = None, free: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the kernels compute, from the same tensors; see `block_sparse_prefill`."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    lists = (counts, partials, indices, mask_ids, masks, starts, ends, biases, block_q, block_k, q_offset, causal)
    for b, rows, cols, mask, bias, _ in _sequences(q, k, *lists, gates, free):
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
    lists = (counts, partials, indices, mask_ids, masks, starts, ends, biases, block_q, block_k, q_offset, causal)
    return gated_backward_reference(grad, grad_lse, q, k, v, out, lse, *lists, scale, None, 0)[:3]


def gated_backward_reference(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, counts: Tensor,
    partials: Tensor, indices: Tensor, mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None,
    ends: Tensor | None, biases: Tensor | None, block_q: int, block_k: int, q_offset: int, causal: bool, scale: float,
    gates: Tensor | None, free: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `prefill_reference` with respect to `q`, `k`, `v` and `gates`."""
    dgate = torch.zeros(*k.shape[:3], dtype=torch.float32, device=k.device)
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    lists = (counts, partials, indices, mask_ids, masks, starts, ends, biases, block_q, block_k, q_offset, causal)
    for b, rows, cols, mask, bias, gated in _sequences(q, k, *lists, gates, free):
        dq[b, :, rows], dk[b, :, cols], dv[b, :, cols], dgate[b, :, cols] = masked_gradients(
            grad[b, :, rows], grad_lse[b, :, rows], q[b, :, rows], k[b, :, cols], v[b, :, cols], out[b, :, rows],
            lse[b, :, rows], mask, scale, bias, gated,
        )  # fmt: skip
    return dq, dk, dv, dgate


def reference(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float,
    starts: Tensor | None = None, ends: Tensor | None = None, gates: Tensor | None = None, free: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`prefill_reference` for lists in one piece."""
    return prefill_reference(
        q, k, v, lists.counts, lists.partials, lists.indices, lists.mask_ids, lists.masks, starts, ends,
        lists.block_q, lists.block_k, lists.q_offset, lists.causal, scale, lists.biases, gates, free,
    )  # fmt: skip
