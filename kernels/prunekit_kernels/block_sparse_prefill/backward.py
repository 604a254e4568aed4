"""Gradients of block-sparse prefill in Triton.

Two kernels: one follows the lists of each block of queries for the gradient of the queries, one follows the same lists
turned around, from each block of keys to the blocks of queries that read it, for those of keys and values.

Shapes: B batch, H query heads, G key-value heads, S queries, T keys, D head size.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b, c, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    if WIDEN:
        c = tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision=PRECISION)
    else:
        c = tl.dot(a, b, c, input_precision=PRECISION)
    return c


@triton.jit
def _kept(
    q_rows, k_rows, mask_ids, masks, mask_at, q_offset, in_block_q, in_block_k,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TABLE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Bool [queries, keys] of a partial block."""
    if TABLE:
        words = masks + (tl.load(mask_ids + mask_at) * BLOCK_Q + in_block_q)[:, None] * (BLOCK_K // 32)
        keep = ((tl.load(words + (in_block_k // 32)[None, :]) >> (in_block_k % 32)[None, :]) & 1) != 0
    elif CAUSAL:
        keep = (q_offset + q_rows)[:, None] >= k_rows[None, :]
    else:
        keep = (q_rows >= 0)[:, None] & (k_rows >= 0)[None, :]
    return keep


@triton.jit(do_not_specialize=["n_rows", "n_queries"])
def _deltas(
    out_ptr, grad_ptr, grad_lse, delta, stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_gs,
    heads, n_queries, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Products of results and their gradients, summed over the head, less the gradient of the log-sum-exp."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    at_d = tl.arange(0, BLOCK_D)
    load = (row < n_queries)[:, None] & (at_d < DIM)[None, :]
    at = row.to(tl.int64)[:, None]
    out_at = out_ptr + batch * stride_ob + head * stride_oh + at * stride_os + at_d[None, :]
    grad_at = grad_ptr + batch * stride_gb + head * stride_gh + at * stride_gs + at_d[None, :]
    out = tl.load(out_at, mask=load, other=0.0).to(tl.float32)
    grad = tl.load(grad_at, mask=load, other=0.0).to(tl.float32)
    line = tl.program_id(1).to(tl.int64) * n_queries + row
    less = tl.load(grad_lse + line, mask=row < n_queries, other=0.0)
    tl.store(delta + line, tl.sum(out * grad, 1) - less, mask=row < n_queries)


@triton.jit(do_not_specialize=["stride_list", "width", "mask_width", "n_queries", "n_keys", "q_offset"])
def _queries(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, counts, partials, indices, mask_ids, masks, biases,
    starts, ends,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gs, stride_list, width, mask_width, n_queries, n_keys, q_offset, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TABLE: tl.constexpr, CAUSAL: tl.constexpr, SPANS: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Gradient of TILE_Q queries of one head."""
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    PARTS: tl.constexpr = BLOCK_Q // TILE_Q
    at = tl.num_programs(0) - 1 - tl.program_id(0)
    row = at // PARTS
    head = tl.program_id(1)
    batch = tl.program_id(2)
    start = 0
    n_rows = n_queries
    n_cols = n_keys
    if SPANS:
        start = tl.load(starts + batch)
        n_rows = tl.load(ends + batch) - start
        n_cols = n_rows
    in_q = (at % PARTS) * TILE_Q + tl.arange(0, TILE_Q)
    at_q = row * BLOCK_Q + in_q
    if row * BLOCK_Q + (at % PARTS) * TILE_Q < n_rows:
        at_d = tl.arange(0, BLOCK_D)
        d_mask = at_d < DIM
        q_mask = (at_q < n_rows)[:, None] & d_mask[None, :]
        slot = (start + at_q).to(tl.int64)
        q_at = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + at_d[None, :]
        g_at = grad_ptr + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh + at_d[None, :]
        q = tl.load(q_at + slot[:, None] * stride_qs, mask=q_mask, other=0.0)
        grad = tl.load(g_at + slot[:, None] * stride_gs, mask=q_mask, other=0.0)
        flat = (batch * tl.num_programs(1) + head).to(tl.int64) * n_queries + slot
        lse = tl.load(lse_ptr + flat, mask=at_q < n_rows, other=0.0) * LOG2E
        # A query that reads no key has minus infinity there; all its products are hidden.
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        delta = tl.load(delta_ptr + flat, mask=at_q < n_rows, other=0.0)
        kv = (head // GROUP).to(tl.int64)
        k_at = k_ptr + batch.to(tl.int64) * stride_kb + kv * stride_kh + start * stride_kt + at_d[None, :]
        v_at = v_ptr + batch.to(tl.int64) * stride_vb + kv * stride_vh + start * stride_vt + at_d[None, :]
        line = head * stride_list + row
        count = tl.load(counts + line) * SPLIT
        partial = tl.load(partials + line) * SPLIT
        acc = tl.zeros([TILE_Q, BLOCK_D], tl.float32)
        for j in range(count):
            block = tl.load(indices + line * width + j // SPLIT)
            in_k = (j % SPLIT) * TILE_K + tl.arange(0, TILE_K)
            k_rows = block * BLOCK_K + in_k
            k_mask = (k_rows < n_cols)[:, None] & d_mask[None, :]
            k = tl.load(k_at + k_rows.to(tl.int64)[:, None] * stride_kt, mask=k_mask, other=0.0)
            v = tl.load(v_at + k_rows.to(tl.int64)[:, None] * stride_vt, mask=k_mask, other=0.0)
            zero = tl.zeros([TILE_Q, TILE_K], tl.float32)
            s = _dot(q, tl.trans(k), zero, WIDEN, PRECISION) * (scale * LOG2E)
            if BIAS:
                s += tl.load(biases + line * width + j // SPLIT) * LOG2E
            s = tl.where((k_rows < n_cols)[None, :], s, float("-inf"))
            if j < partial:
                mask_at = line * mask_width + j // SPLIT
                keep = _kept(
                    at_q, k_rows, mask_ids, masks, mask_at, q_offset, in_q, in_k, BLOCK_Q, BLOCK_K, TABLE, CAUSAL
                )
                s = tl.where(keep, s, float("-inf"))
            p = tl.exp2(s - lse[:, None])
            dp = _dot(grad, tl.trans(v), zero, WIDEN, PRECISION)
            ds = (p * (dp - delta[:, None])).to(k.dtype)
            acc = _dot(ds, k, acc, WIDEN, PRECISION)
        out = dq_ptr + flat[:, None] * DIM + at_d[None, :]
        tl.store(out, (acc * scale).to(dq_ptr.dtype.element_ty), mask=q_mask)


@triton.jit(do_not_specialize=["list_rows", "width", "mask_width", "n_cols", "n_queries", "n_keys", "q_offset"])
def _keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, partials, order, firsts, mask_ids, masks,
    biases, starts, ends,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gs, list_rows, width, mask_width, n_cols, n_queries, n_keys, q_offset, scale,
    PER_HEAD: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TABLE: tl.constexpr, CAUSAL: tl.constexpr,
    SPANS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Gradients of TILE_K keys and values of one key-value head, over all its query heads."""
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    PARTS: tl.constexpr = BLOCK_Q // TILE_Q
    block = tl.program_id(0) // SPLIT
    kv = tl.program_id(1)
    batch = tl.program_id(2)
    start = 0
    n_rows = n_queries
    n_inside = n_keys
    if SPANS:
        start = tl.load(starts + batch)
        n_rows = tl.load(ends + batch) - start
        n_inside = n_rows
    in_k = (tl.program_id(0) % SPLIT) * TILE_K + tl.arange(0, TILE_K)
    k_rows = block * BLOCK_K + in_k
    at_d = tl.arange(0, BLOCK_D)
    d_mask = at_d < DIM
    k_mask = (k_rows < n_inside)[:, None] & d_mask[None, :]
    k_slot = (start + k_rows).to(tl.int64)
    k_at = k_ptr + batch.to(tl.int64) * stride_kb + kv.to(tl.int64) * stride_kh + at_d[None, :]
    v_at = v_ptr + batch.to(tl.int64) * stride_vb + kv.to(tl.int64) * stride_vh + at_d[None, :]
    k = tl.load(k_at + k_slot[:, None] * stride_kt, mask=k_mask, other=0.0)
    v = tl.load(v_at + k_slot[:, None] * stride_vt, mask=k_mask, other=0.0)
    dk = tl.zeros([TILE_K, BLOCK_D], tl.float32)
    dv = tl.zeros([TILE_K, BLOCK_D], tl.float32)
    for g in range(GROUP):
        head = kv * GROUP + g
        column = (head if PER_HEAD else 0) * n_cols + block
        q_at = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + at_d[None, :]
        g_at = grad_ptr + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh + at_d[None, :]
        flat = (batch * tl.num_programs(1) * GROUP + head).to(tl.int64) * n_queries + start
        first = tl.load(firsts + column) * PARTS
        last = tl.load(firsts + column + 1) * PARTS
        for e in range(first, last):
            entry = tl.load(order + e // PARTS)
            line = entry // width
            slot = entry % width
            in_q = (e % PARTS) * TILE_Q + tl.arange(0, TILE_Q)
            at_q = (line % list_rows) * BLOCK_Q + in_q
            q_mask = (at_q < n_rows)[:, None] & d_mask[None, :]
            q_slot = (start + at_q).to(tl.int64)[:, None]
            q = tl.load(q_at + q_slot * stride_qs, mask=q_mask, other=0.0)
            grad = tl.load(g_at + q_slot * stride_gs, mask=q_mask, other=0.0)
            lse = tl.load(lse_ptr + flat + at_q, mask=at_q < n_rows, other=float("inf")) * LOG2E
            lse = tl.where(lse == float("-inf"), float("inf"), lse)
            delta = tl.load(delta_ptr + flat + at_q, mask=at_q < n_rows, other=0.0)
            zero = tl.zeros([TILE_Q, TILE_K], tl.float32)
            s = _dot(q, tl.trans(k), zero, WIDEN, PRECISION) * (scale * LOG2E)
            if BIAS:
                s += tl.load(biases + entry) * LOG2E
            if slot < tl.load(partials + line):
                mask_at = line * mask_width + slot
                keep = _kept(
                    at_q, k_rows, mask_ids, masks, mask_at, q_offset, in_q, in_k, BLOCK_Q, BLOCK_K, TABLE, CAUSAL
                )
                s = tl.where(keep, s, float("-inf"))
            p = tl.exp2(s - lse[:, None])
            dv = _dot(tl.trans(p.to(grad.dtype)), grad, dv, WIDEN, PRECISION)
            dp = _dot(grad, tl.trans(v), zero, WIDEN, PRECISION)
            ds = (p * (dp - delta[:, None])).to(q.dtype)
            dk = _dot(tl.trans(ds), q, dk, WIDEN, PRECISION)
    out = (batch * tl.num_programs(1) + kv).to(tl.int64) * n_keys + k_slot
    tl.store(dk_ptr + out[:, None] * DIM + at_d[None, :], (dk * scale).to(dk_ptr.dtype.element_ty), mask=k_mask)
    tl.store(dv_ptr + out[:, None] * DIM + at_d[None, :], dv.to(dv_ptr.dtype.element_ty), mask=k_mask)


def turned_around(counts: Tensor, indices: Tensor, n_cols: int) -> tuple[Tensor, Tensor]:
    """For each block of keys the entries of the lists that name it, without asking the device for anything.

    Args:
        counts: int32 [1 or H, rows].
        indices: int32 [1 or H, rows, width].
        n_cols: blocks of keys.
    Returns:
        int32 [entries], places in the flattened `indices` sorted by list head and key block, and int32
        [(1 or H) * n_cols + 1], where the entries of a key block begin.
    """
    heads, _, width = indices.shape
    listed = torch.arange(width, device=indices.device) < counts.unsqueeze(-1)
    head = torch.arange(heads, device=indices.device)[:, None, None] * n_cols
    column = torch.where(listed, indices + head, heads * n_cols).flatten()
    sorted_columns, order = torch.sort(column, stable=True)
    bounds = torch.arange(heads * n_cols + 1, device=indices.device, dtype=sorted_columns.dtype)
    return order.to(torch.int32), torch.searchsorted(sorted_columns, bounds).to(torch.int32)


def launch(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, counts: Tensor,
    partials: Tensor, indices: Tensor, mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None,
    ends: Tensor | None, biases: Tensor | None, block_q: int, block_k: int, q_offset: int, causal: bool, scale: float,
    tile_q: int = 64, tile_k: int = 64, warps: int = 4, stages: int = 2, tile_k_keys: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Runs the kernels; the gradients of `q`, `k` and `v`, contiguous.

    Args:
        tile_q: queries of a step in both kernels, at most `block_q`.
        tile_k: keys of a step in the first kernel, at most `block_k`.
        warps: warps of a program.
        stages: pipeline stages.
        tile_k_keys: keys of a program in the second kernel, at most `block_k`.
    """
    batch, heads, n_queries, dim = q.shape
    kv_heads, n_keys = k.shape[1], k.shape[2]
    spans = starts is not None and ends is not None
    tile_q, tile_k, tile_k_keys = min(tile_q, block_q), min(tile_k, block_k), min(tile_k_keys, block_k)
    make = torch.zeros if spans else torch.empty
    dq = make(q.shape, dtype=q.dtype, device=q.device)
    dk = make(k.shape, dtype=k.dtype, device=k.device)
    dv = make(v.shape, dtype=v.dtype, device=v.device)
    delta = torch.empty_like(lse)
    block_d = max(16, triton.next_power_of_2(dim))
    _deltas[(triton.cdiv(n_queries, 32), batch * heads)](
        out, grad, grad_lse.contiguous(), delta, *out.stride()[:3], *grad.stride()[:3], heads, n_queries,
        DIM=dim, BLOCK_D=block_d, ROWS=32, num_warps=4,
    )  # fmt: skip
    n_cols = -(-n_keys // block_k)
    order, firsts = turned_around(counts, indices, n_cols)
    nothing = counts
    tables = (nothing if mask_ids is None else mask_ids, nothing if masks is None else masks)
    extra = (nothing if biases is None else biases, starts if spans else nothing, ends if spans else nothing)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    mask_width = 0 if mask_ids is None else mask_ids.shape[2]
    width, list_rows = indices.shape[2], counts.shape[1]
    shared = {
        "GROUP": heads // kv_heads, "DIM": dim, "BLOCK_D": block_d, "BLOCK_Q": block_q, "BLOCK_K": block_k,
        "TILE_Q": tile_q, "TABLE": masks is not None, "CAUSAL": causal, "SPANS": spans, "BIAS": biases is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        # Triton's interpreter multiplies the bit patterns of bfloat16.
        "WIDEN": q.dtype == torch.bfloat16 and not q.is_cuda, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    _queries[(list_rows * (block_q // tile_q), heads, batch)](
        q, k, v, grad, lse, delta, dq, counts, partials, indices, *tables, *extra, *strides,
        list_rows if counts.shape[0] > 1 else 0, width, mask_width, n_queries, n_keys, q_offset, scale,
        TILE_K=tile_k, **shared,
    )  # fmt: skip
    _keys[(n_cols * (block_k // tile_k_keys), kv_heads, batch)](
        q, k, v, grad, lse, delta, dk, dv, partials, order, firsts, *tables, *extra, *strides,
        list_rows, width, mask_width, n_cols, n_queries, n_keys, q_offset, scale,
        PER_HEAD=counts.shape[0] > 1, TILE_K=tile_k_keys, **shared,
    )  # fmt: skip
    return dq, dk, dv
