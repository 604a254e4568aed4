"""Gradients of block-sparse prefill in Triton.

Two kernels: one follows the lists of each block of queries for the gradient of the queries, one follows the same lists
turned around, from each block of keys to the blocks of queries that read it, for those of keys and values. The second
holds scores as [keys, queries], so that they go from one product to the next in registers, and cuts the list of a block
of keys that many queries read, such as the first one of a prompt, among several programs.

Shapes: B batch, H query heads, G key-value heads, S queries, T keys, D head size.
"""

# mypy: ignore-errors
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekit_kernels._triton import LOG2E, dot, precision
from prunekit_kernels.block_sparse_prefill.portable import table_mask
from prunekit_kernels.block_sparse_prefill.readers import cut, turned_around

# Blocks of queries that one program of the second kernel follows for a head. Of 16, 32, 64 and all, 16 was the fastest
# at 8,192 and 32,768 tokens of the power pattern on an H100: 7.4, 7.7, 8.0 and 11.0 ms at 32,768.
CHUNK = 16


@dataclass(frozen=True)
class Layout:
    """How a kernel is laid out: queries and keys of a step, dividing the blocks of the lists, warps, stages."""

    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _queries_step(
    acc, q, grad, lse, delta, at_q, in_q, block, j, k_at, v_at, d_mask, n_cols, mask_ids, masks, biases, slot, mask_at,
    stride_kt, stride_vt, q_offset, scale_log2,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, MASKED: tl.constexpr, CHECK: tl.constexpr,
    TABLE: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, PAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Adds what TILE_K keys give to the gradient of the queries."""
    first_k = j % (BLOCK_K // TILE_K) * TILE_K
    k_rows = block * BLOCK_K + first_k + tl.arange(0, TILE_K)
    k_slot = k_rows.to(tl.int64)[:, None]
    if CHECK or PAD_DIM:
        load = (k_rows < n_cols)[:, None] & d_mask[None, :]
        k = tl.load(k_at + k_slot * stride_kt, mask=load, other=0.0)
        v = tl.load(v_at + k_slot * stride_vt, mask=load, other=0.0)
    else:
        k = tl.load(k_at + k_slot * stride_kt)
        v = tl.load(v_at + k_slot * stride_vt)
    zero = tl.zeros([q.shape[0], TILE_K], tl.float32)
    s = dot(q, tl.trans(k), zero, WIDEN, PRECISION)
    if MASKED:
        keep = (k_rows < n_cols)[None, :] & (at_q >= 0)[:, None]
        if TABLE:
            number = tl.load(mask_ids + mask_at)
            keep = keep & table_mask(masks, number, in_q, first_k, BLOCK_Q, BLOCK_K, TILE_K, False)
        elif CAUSAL:
            keep = keep & ((q_offset + at_q)[:, None] >= k_rows[None, :])
        s = tl.where(keep, s, float("-inf"))
    elif CHECK:
        s = tl.where((k_rows < n_cols)[None, :], s, float("-inf"))
    less = lse - tl.load(biases + slot) * LOG2E if BIAS else lse
    p = tl.exp2(s * scale_log2 - less[:, None])
    dp = dot(grad, tl.trans(v), zero, WIDEN, PRECISION)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return dot(ds, k, acc, WIDEN, PRECISION)


@triton.jit(do_not_specialize=["stride_list", "width", "mask_width", "n_queries", "n_keys", "q_offset", "apart"])
def _queries(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, grad_lse, lse_ptr, delta_ptr, dq_ptr, counts, partials, indices, mask_ids,
    masks, biases, starts, ends,
    stride_ob, stride_oh, stride_os, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_gb, stride_gh, stride_gs, stride_list, width, mask_width, n_queries, n_keys,
    q_offset, apart, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TABLE: tl.constexpr, CAUSAL: tl.constexpr, SPANS: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Gradient of TILE_Q queries of one head.

    Also their products of results and gradients, summed over the head, less the gradient of the log-sum-exp, which the
    second kernel wants.
    """
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    PARTS: tl.constexpr = BLOCK_Q // TILE_Q
    at = tl.num_programs(0) - 1 - tl.program_id(0)
    row = at // PARTS
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    # Sequences that lie one behind another are all in the first row of the batch.
    batch = sequence * apart
    start = 0
    n_rows = n_queries
    n_cols = n_keys
    if SPANS:
        start = tl.load(starts + sequence)
        n_rows = tl.load(ends + sequence) - start
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
        o_at = out_ptr + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + at_d[None, :]
        out = tl.load(o_at + slot[:, None] * stride_os, mask=q_mask, other=0.0)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        delta -= tl.load(grad_lse + flat, mask=at_q < n_rows, other=0.0)
        tl.store(delta_ptr + flat, delta, mask=at_q < n_rows)
        kv = (head // GROUP).to(tl.int64)
        first_slot = tl.cast(start, tl.int64)
        k_at = k_ptr + batch.to(tl.int64) * stride_kb + kv * stride_kh + first_slot * stride_kt + at_d[None, :]
        v_at = v_ptr + batch.to(tl.int64) * stride_vb + kv * stride_vh + first_slot * stride_vt + at_d[None, :]
        line = head * stride_list + row
        count = tl.load(counts + line) * SPLIT
        partial = tl.load(partials + line) * SPLIT
        acc = tl.zeros([TILE_Q, BLOCK_D], tl.float32)
        for j in range(partial):
            block = tl.load(indices + line * width + j // SPLIT)
            acc = _queries_step(
                acc, q, grad, lse, delta, at_q, in_q, block, j, k_at, v_at, d_mask, n_cols, mask_ids, masks, biases,
                line * width + j // SPLIT, line * mask_width + j // SPLIT, stride_kt, stride_vt, q_offset,
                scale * LOG2E, BLOCK_Q, BLOCK_K, TILE_K, True, True, TABLE, CAUSAL, BIAS, BLOCK_D != DIM, PRECISION,
                WIDEN,
            )  # fmt: skip
        ahead = tl.load(indices + line * width + partial // SPLIT, mask=partial < count, other=0)
        for j in range(partial, count):
            block = ahead
            # Loaded a step ahead: the pipeline of a load whose address is loaded in the same step is shallow.
            ahead = tl.load(indices + line * width + (j + 1) // SPLIT, mask=j + 1 < count, other=0)
            acc = _queries_step(
                acc, q, grad, lse, delta, at_q, in_q, block, j, k_at, v_at, d_mask, n_cols, mask_ids, masks, biases,
                line * width + j // SPLIT, 0, stride_kt, stride_vt, q_offset,
                scale * LOG2E, BLOCK_Q, BLOCK_K, TILE_K, False, SPANS, TABLE, CAUSAL, BIAS, BLOCK_D != DIM, PRECISION,
                WIDEN,
            )  # fmt: skip
        dq_at = dq_ptr + flat[:, None] * DIM + at_d[None, :]
        tl.store(dq_at, (acc * scale).to(dq_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def _keys_step(
    dk, dv, k, v, entry, part, k_rows, first_k, q_at, g_at, lse_at, delta_at, d_mask, start, n_rows, mask_ids,
    masks, biases, stride_qs, stride_gs, list_rows, width, mask_width, q_offset, scale_log2,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, MASKED: tl.constexpr,
    CHECK: tl.constexpr, TABLE: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, PAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Adds what TILE_Q queries give to the gradients of the keys and values."""
    line = entry // width
    in_q = part * TILE_Q + tl.arange(0, TILE_Q)
    at_q = line % list_rows * BLOCK_Q + in_q
    q_slot = (start + at_q).to(tl.int64)[:, None]
    if CHECK or PAD_DIM:
        load = (at_q < n_rows)[:, None] & d_mask[None, :]
        q = tl.load(q_at + q_slot * stride_qs, mask=load, other=0.0)
        grad = tl.load(g_at + q_slot * stride_gs, mask=load, other=0.0)
    else:
        q = tl.load(q_at + q_slot * stride_qs)
        grad = tl.load(g_at + q_slot * stride_gs)
    lse = tl.load(lse_at + at_q, mask=at_q < n_rows, other=float("inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.load(delta_at + at_q, mask=at_q < n_rows, other=0.0)
    zero = tl.zeros([TILE_K, TILE_Q], tl.float32)
    s = dot(k, tl.trans(q), zero, WIDEN, PRECISION)
    if MASKED:
        if TABLE:
            number = tl.load(mask_ids + line * mask_width + entry % width)
            s = tl.where(
                table_mask(masks, number, in_q, first_k, BLOCK_Q, BLOCK_K, TILE_K, True), s, float("-inf")
            )  # fmt: skip
        elif CAUSAL:
            s = tl.where((q_offset + at_q)[None, :] >= k_rows[:, None], s, float("-inf"))
    less = lse - tl.load(biases + entry) * LOG2E if BIAS else lse
    p = tl.exp2(s * scale_log2 - less[None, :])
    dv = dot(p.to(grad.dtype), grad, dv, WIDEN, PRECISION)
    dp = dot(v, tl.trans(grad), zero, WIDEN, PRECISION)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    return dot(ds, q, dk, WIDEN, PRECISION), dv


@triton.jit(
    do_not_specialize=[
        "list_rows", "width", "mask_width", "n_cols", "chunk", "n_queries", "n_keys", "q_offset", "n_items", "apart"
    ]
)  # fmt: skip
def _keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dk_sum, dv_sum, order, bounds, items, n_chunks,
    mask_ids, masks, biases, starts, ends,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gs, list_rows, width, mask_width, n_cols, chunk, n_items, n_queries, n_keys, q_offset,
    apart, scale,
    PER_HEAD: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TABLE: tl.constexpr, CAUSAL: tl.constexpr,
    SPANS: tl.constexpr, CHECK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Gradients of TILE_K keys and values of one key-value head, over all its query heads and one chunk of readers."""
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    PARTS: tl.constexpr = BLOCK_Q // TILE_Q
    item = tl.program_id(0) // SPLIT
    block = tl.load(items + item)
    number = tl.load(items + n_items + item)
    kv = tl.program_id(1)
    sequence = tl.program_id(2)
    batch = sequence * apart
    start = 0
    n_rows = n_queries
    n_inside = n_keys
    if SPANS:
        start = tl.load(starts + sequence)
        n_rows = tl.load(ends + sequence) - start
        n_inside = n_rows
    if block < n_cols:
        first_k = (tl.program_id(0) % SPLIT) * TILE_K
        k_rows = block * BLOCK_K + first_k + tl.arange(0, TILE_K)
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
            # Entries of a block lie masked ones first: those up to `middle`, then those up to `last`.
            column = 2 * ((head if PER_HEAD else 0) * n_cols + block)
            q_at = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + at_d[None, :]
            g_at = grad_ptr + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh + at_d[None, :]
            flat = (batch * tl.num_programs(1) * GROUP + head).to(tl.int64) * n_queries + start
            first = tl.load(bounds + column) + number * chunk
            last = tl.minimum(first + chunk, tl.load(bounds + column + 2))
            middle = tl.minimum(tl.maximum(tl.load(bounds + column + 1), first), last)
            for e in range(first * PARTS, middle * PARTS):
                dk, dv = _keys_step(
                    dk, dv, k, v, tl.load(order + e // PARTS), e % PARTS, k_rows, first_k, q_at, g_at,
                    lse_ptr + flat, delta_ptr + flat, d_mask, start, n_rows, mask_ids, masks, biases, stride_qs,
                    stride_gs, list_rows, width, mask_width, q_offset, scale * LOG2E, BLOCK_Q, BLOCK_K, TILE_Q,
                    TILE_K, True, True, TABLE, CAUSAL, BIAS, BLOCK_D != DIM, PRECISION, WIDEN,
                )  # fmt: skip
            ahead = tl.load(order + middle, mask=middle < last, other=0)
            for e in range(middle * PARTS, last * PARTS):
                entry = ahead
                ahead = tl.load(order + (e + 1) // PARTS, mask=e + 1 < last * PARTS, other=0)
                dk, dv = _keys_step(
                    dk, dv, k, v, entry, e % PARTS, k_rows, first_k, q_at, g_at,
                    lse_ptr + flat, delta_ptr + flat, d_mask, start, n_rows, mask_ids, masks, biases, stride_qs,
                    stride_gs, list_rows, width, mask_width, q_offset, scale * LOG2E, BLOCK_Q, BLOCK_K, TILE_Q,
                    TILE_K, False, CHECK, TABLE, CAUSAL, BIAS, BLOCK_D != DIM, PRECISION, WIDEN,
                )  # fmt: skip
        out = ((batch * tl.num_programs(1) + kv).to(tl.int64) * n_keys + k_slot)[:, None] * DIM + at_d[None, :]
        if tl.load(n_chunks + block) == 1:
            tl.store(dk_ptr + out, (dk * scale).to(dk_ptr.dtype.element_ty), mask=k_mask)
            tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty), mask=k_mask)
        else:
            tl.atomic_add(dk_sum + out, dk * scale, mask=k_mask, sem="relaxed")
            tl.atomic_add(dv_sum + out, dv, mask=k_mask, sem="relaxed")


@triton.jit(do_not_specialize=["n_tokens", "apart"])
def _rounded(
    dk_ptr, dv_ptr, dk_sum, dv_sum, n_chunks, starts, ends, n_tokens, apart,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Sums over several chunks in the dtype of the gradients."""
    block = tl.program_id(0) * ROWS // BLOCK_K
    if tl.load(n_chunks + block) > 1:
        sequence = tl.program_id(2)
        batch = sequence * apart
        start = 0
        n_inside = n_tokens
        if SPANS:
            start = tl.load(starts + sequence)
            n_inside = tl.load(ends + sequence) - start
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        at_d = tl.arange(0, BLOCK_D)
        mask = (row < n_inside)[:, None] & (at_d < DIM)[None, :]
        line = (batch * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        at = (line * n_tokens + start + row)[:, None] * DIM + at_d[None, :]
        tl.store(dk_ptr + at, tl.load(dk_sum + at, mask=mask).to(dk_ptr.dtype.element_ty), mask=mask)
        tl.store(dv_ptr + at, tl.load(dv_sum + at, mask=mask).to(dv_ptr.dtype.element_ty), mask=mask)


def default_layouts(dim: int, block_q: int, block_k: int) -> tuple[Layout, Layout]:
    """Layouts of the two kernels, the fastest of thirteen at 32,768 tokens and head size 128 on an H100."""
    # Gradients of 256 channels fill the registers of smaller tiles.
    most = 64 if dim <= 128 else 32
    q, k = min(most, block_q), min(most, block_k)
    if dim > 128:
        return Layout(q, k, 4, 2), Layout(q, k, 4, 2)
    wide = Layout(min(128, block_q), k, 8, 3)
    return wide if block_q >= 128 else Layout(q, k, 4, 2), Layout(q, k, 4, 2)


def launch(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, counts: Tensor,
    partials: Tensor, indices: Tensor, mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None,
    ends: Tensor | None, biases: Tensor | None, block_q: int, block_k: int, q_offset: int, causal: bool, scale: float,
    layouts: tuple[Layout, Layout] | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Runs the kernels; the gradients of `q`, `k` and `v`, contiguous.

    Args:
        layouts: of the first and the second kernel, `default_layouts` if None.
        chunk: blocks of queries of a head that one program of the second kernel follows; None for `CHUNK`, or for all
            where torch is asked for deterministic algorithms, since chunks are summed in any order.
    """
    batch, heads, n_queries, dim = q.shape
    kv_heads, n_keys = k.shape[1], k.shape[2]
    width, list_rows = indices.shape[2], counts.shape[1]
    spans = starts is not None and ends is not None
    sequences = len(starts) if spans else batch
    apart = int(sequences == batch)
    for_queries, for_keys = layouts or default_layouts(dim, block_q, block_k)
    if chunk is None:
        chunk = list_rows if torch.are_deterministic_algorithms_enabled() else CHUNK
    chunk = min(chunk, list_rows)
    make = torch.zeros if spans else torch.empty
    dq = make(q.shape, dtype=q.dtype, device=q.device)
    dk = make(k.shape, dtype=k.dtype, device=k.device)
    dv = make(v.shape, dtype=v.dtype, device=v.device)
    delta = torch.empty_like(lse)
    block_d = max(16, triton.next_power_of_2(dim))
    # Lists of sequences that lie one behind another are for the longest.
    n_cols = -(-(min(n_keys, list_rows * block_q) if spans else n_keys) // block_k)
    order, bounds = turned_around(counts, partials, indices, n_cols)
    most = n_cols * -(-list_rows // chunk)
    if counts.shape[0] == 1:
        most = min(most, n_cols + list_rows * width // chunk)
    items, n_chunks = cut(bounds, n_cols, chunk, most)
    split = list_rows > chunk
    dk_sum, dv_sum = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) if split else lse for _ in "kv")
    nothing = counts
    tables = (nothing if mask_ids is None else mask_ids, nothing if masks is None else masks)
    extra = (nothing if biases is None else biases, starts if spans else nothing, ends if spans else nothing)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    mask_width = 0 if mask_ids is None else mask_ids.shape[2]
    shared = {
        "GROUP": heads // kv_heads, "DIM": dim, "BLOCK_D": block_d, "BLOCK_Q": block_q, "BLOCK_K": block_k,
        "TABLE": masks is not None, "CAUSAL": causal, "SPANS": spans, "BIAS": biases is not None,
        **precision(q),
    }  # fmt: skip
    how = for_queries
    _queries[(list_rows * (block_q // how.queries), heads, sequences)](
        q, k, v, out, grad, grad_lse.contiguous(), lse, delta, dq, counts, partials, indices, *tables, *extra,
        *out.stride()[:3], *strides,
        list_rows if counts.shape[0] > 1 else 0, width, mask_width, n_queries, n_keys, q_offset, apart, scale,
        TILE_Q=how.queries, TILE_K=how.keys, num_warps=how.warps, num_stages=how.stages, **shared,
    )  # fmt: skip
    how = for_keys
    _keys[(most * (block_k // how.keys), kv_heads, sequences)](
        q, k, v, grad, lse, delta, dk, dv, dk_sum, dv_sum, order, bounds, items, n_chunks, *tables, *extra, *strides,
        list_rows, width, mask_width, n_cols, chunk, most, n_queries, n_keys, q_offset, apart, scale,
        PER_HEAD=counts.shape[0] > 1, CHECK=spans or n_queries % block_q > 0, TILE_Q=how.queries, TILE_K=how.keys,
        num_warps=how.warps, num_stages=how.stages, **shared,
    )  # fmt: skip
    if split:
        rows = min(32, block_k)
        _rounded[(triton.cdiv(min(n_keys, n_cols * block_k), rows), kv_heads, sequences)](
            dk, dv, dk_sum, dv_sum, n_chunks, *extra[1:], n_keys, apart,
            DIM=dim, BLOCK_D=block_d, BLOCK_K=block_k, ROWS=rows, SPANS=spans, num_warps=4,
        )  # fmt: skip
    return dq, dk, dv
