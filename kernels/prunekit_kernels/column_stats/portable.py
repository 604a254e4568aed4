"""Column statistics in Triton, for any GPU it compiles for and for its interpreter.

One program takes one block of keys of one query head and walks the queries that see it; nothing of the attention matrix
is written.

Shapes: B batch, H query heads, G key-value heads, S queries, T keys, D head size.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekit_kernels import _device
from prunekit_kernels._triton import LOG2E, dot, precision


@triton.jit(do_not_specialize=["n_queries", "n_keys", "q_offset"])
def _stats(
    q_ptr, k_ptr, lse_ptr, sums_ptr, most_ptr, starts, ends,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, n_queries, n_keys, q_offset, scale_log2,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    CAUSAL: tl.constexpr, SPANS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    batch = tl.program_id(2)
    at_k = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    at_d = tl.arange(0, BLOCK_D)
    d_mask = at_d < DIM
    inside = at_k < n_keys
    first = 0
    last = n_queries
    if SPANS:
        start = tl.load(starts + batch)
        end = tl.load(ends + batch)
        inside = (at_k >= start) & (at_k < end)
        first = tl.maximum(start - q_offset, 0)
        last = tl.minimum(end - q_offset, n_queries)
    if CAUSAL:
        # No query before the block's first key sees any of it.
        first = tl.maximum(first, tl.program_id(0) * KEYS - q_offset)
    k_at = k_ptr + batch.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    k_at += at_k.to(tl.int64)[:, None] * stride_kt + at_d[None, :]
    k = tl.load(k_at, mask=inside[:, None] & d_mask[None, :], other=0.0)
    q_at = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + at_d[None, :]
    line = (batch * tl.num_programs(1) + head).to(tl.int64)
    sums = tl.zeros([KEYS], tl.float32)
    most = tl.zeros([KEYS], tl.float32)
    for at in range(first, last, QUERIES):
        at_q = at + tl.arange(0, QUERIES)
        real = at_q < last
        load = real[:, None] & d_mask[None, :]
        q = tl.load(q_at + at_q.to(tl.int64)[:, None] * stride_qs, mask=load, other=0.0)
        lse = tl.load(lse_ptr + line * n_queries + at_q, mask=real, other=float("-inf"))
        # A query that reads nothing has minus infinity there, and gives nothing.
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
        s = dot(q, tl.trans(k), None, WIDEN, PRECISION)
        p = tl.exp2(s * scale_log2 - lse[:, None])
        if CAUSAL:
            p = tl.where((q_offset + at_q)[:, None] >= at_k[None, :], p, 0.0)
        sums += tl.sum(p, 0)
        most = tl.maximum(most, tl.max(p, 0))
    out = line * n_keys + at_k
    tl.store(sums_ptr + out, tl.where(inside, sums, 0.0), mask=at_k < n_keys)
    tl.store(most_ptr + out, tl.where(inside, most, 0.0), mask=at_k < n_keys)


def launch(
    q: Tensor, k: Tensor, lse: Tensor, starts: Tensor | None, ends: Tensor | None, q_offset: int, causal: bool,
    scale: float, keys: int = 64, queries: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs the kernel; arguments and result as in `column_stats`, head dimensions contiguous.

    Args:
        keys: keys of a program.
        queries: queries of a step.
    """
    batch, heads, n_queries, dim = q.shape
    n_keys = k.shape[2]
    spans = starts is not None and ends is not None
    sums = torch.empty(batch, heads, n_keys, dtype=torch.float32, device=q.device)
    most = torch.empty_like(sums)
    _stats[(triton.cdiv(n_keys, keys), heads, batch)](
        q, k, lse.contiguous(), sums, most, starts if spans else lse, ends if spans else lse,
        *q.stride()[:3], *k.stride()[:3], n_queries, n_keys, q_offset, scale * _device.LOG2E,
        GROUP=heads // k.shape[1], DIM=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), KEYS=keys, QUERIES=queries,
        CAUSAL=causal, SPANS=spans, **precision(q), num_warps=4, num_stages=2,
    )  # fmt: skip
    return sums, most
