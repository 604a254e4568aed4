"""Block-sparse prefill in Triton, for any GPU it compiles for and for its interpreter.

One program takes one block of queries of one head and walks the row's key-block list, masked blocks first. Pointer
loads: tensor descriptors gave 0.8 to 1.0 of this speed on an H200 (128 by 128 tiles, head size 128, bfloat16).

Shapes: B batch, H query heads, G key-value heads, S queries, T keys, D head size.
"""

# mypy: ignore-errors
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekit_kernels import _device
from prunekit_kernels._triton import LOG2E, dot, precision

LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Tile:
    """How a launch is laid out: keys per step (dividing the list's block), warps, pipeline stages."""

    keys: int
    warps: int
    stages: int


@triton.jit
def table_mask(
    masks, number, in_q, first_k, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Bool [queries, TILE] of mask `number`, or [TILE, queries] if KEYS_FIRST, from key `first_k` of the block on.

    A word is loaded once for each query and chosen by column: a load for each pair took three times the rest of the
    kernel.
    """
    AXIS: tl.constexpr = 1 if KEYS_FIRST else 0
    column = tl.arange(0, TILE)
    at = masks + (number * BLOCK_Q + in_q) * (BLOCK_K // 32) + first_k // 32
    words = tl.expand_dims(tl.load(at), 1 - AXIS)
    for w in tl.static_range(1, TILE // 32):
        words = tl.where(tl.expand_dims(column // 32 == w, AXIS), tl.expand_dims(tl.load(at + w), 1 - AXIS), words)
    return ((words >> tl.expand_dims((first_k + column) % 32, AXIS)) & 1) != 0


@triton.jit
def _accumulate(
    acc, m, l, q, k_at, v_at, k_rows, n_keys, d_mask, keep, bias, gate, stride_kt, stride_vt, scale_log2,
    CHECK_KEYS: tl.constexpr, MASKED: tl.constexpr, PAD_DIM: tl.constexpr, GATE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over `k_rows`.

    `keep` counts only if MASKED, `gate` (base two, by pair) only if GATE; `bias` (base two) goes to all.
    """
    inside = k_rows < n_keys
    if CHECK_KEYS:
        load = inside[:, None] & d_mask[None, :] if PAD_DIM else inside[:, None]
        k = tl.load(k_at + k_rows.to(tl.int64)[:, None] * stride_kt, mask=load, other=0.0)
        v = tl.load(v_at + k_rows.to(tl.int64)[:, None] * stride_vt, mask=load, other=0.0)
    elif PAD_DIM:
        k = tl.load(k_at + k_rows.to(tl.int64)[:, None] * stride_kt, mask=d_mask[None, :], other=0.0)
        v = tl.load(v_at + k_rows.to(tl.int64)[:, None] * stride_vt, mask=d_mask[None, :], other=0.0)
    else:
        k = tl.load(k_at + k_rows.to(tl.int64)[:, None] * stride_kt)
        v = tl.load(v_at + k_rows.to(tl.int64)[:, None] * stride_vt)
    s = dot(q, tl.trans(k), None, WIDEN, PRECISION)
    if GATE:
        s = s * scale_log2 + gate
        scale_log2 = 1.0
    if MASKED:
        s = tl.where(keep & inside[None, :], s, float("-inf"))
    elif CHECK_KEYS:
        s = tl.where(inside[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2 + bias)
    safe = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED or CHECK_KEYS or GATE else m_new
    alpha = tl.exp2(m - safe)
    p = tl.exp2(s * scale_log2 - (safe - bias)[:, None])
    l = l * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    return dot(p.to(v.dtype), v, acc, WIDEN, PRECISION), m_new, l


@triton.jit
def _gate(gate_at, q_rows, k_rows, n_keys, q_offset, free):
    """Gates of the pairs, base two: none for a key less than `free` tokens behind the query."""
    g = tl.load(gate_at + k_rows, mask=k_rows < n_keys, other=0.0) * LOG2E
    near = (q_offset + q_rows)[:, None] - k_rows[None, :] < free
    return tl.where(near, 0.0, g[None, :])


# Without this the compiler builds one kernel for each divisibility of each length.
@triton.jit(do_not_specialize=["stride_list", "width", "mask_width", "n_queries", "n_keys", "q_offset", "free"])
def _prefill(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, counts, partials, indices, mask_ids, masks, starts, ends, biases, gates, free,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_os, stride_lb, stride_gb, stride_list, width, mask_width, n_queries, n_keys, q_offset,
    scale_log2,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE: tl.constexpr, TABLE: tl.constexpr, CAUSAL: tl.constexpr, SPANS: tl.constexpr, BIAS: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    SPLIT: tl.constexpr = BLOCK_K // TILE
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    start = 0
    if SPANS:
        start = tl.load(starts + batch)
        length = tl.load(ends + batch) - start
        n_rows = length
        n_cols = length
    else:
        n_rows = n_queries
        n_cols = n_keys
    first = row * BLOCK_Q
    if first < n_rows:
        at_q = first + tl.arange(0, BLOCK_Q)
        at_d = tl.arange(0, BLOCK_D)
        d_mask = at_d < DIM
        q_mask = (at_q < n_rows)[:, None] & d_mask[None, :]
        q_at = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        q = tl.load(q_at + (start + at_q).to(tl.int64)[:, None] * stride_qs + at_d[None, :], mask=q_mask, other=0.0)
        kv = head // GROUP
        first_slot = tl.cast(start, tl.int64)
        k_at = k_ptr + batch.to(tl.int64) * stride_kb + kv.to(tl.int64) * stride_kh + at_d[None, :]
        v_at = v_ptr + batch.to(tl.int64) * stride_vb + kv.to(tl.int64) * stride_vh + at_d[None, :]
        k_at += first_slot * stride_kt
        v_at += first_slot * stride_vt
        gate_at = gates + batch.to(tl.int64) * stride_gb + kv.to(tl.int64) * n_keys + start
        line = head * stride_list + row
        count = tl.load(counts + line) * SPLIT
        partial = tl.load(partials + line) * SPLIT
        acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_Q], tl.float32)
        for j in range(partial):
            block = tl.load(indices + line * width + j // SPLIT)
            k_rows = block * BLOCK_K + (j % SPLIT) * TILE + tl.arange(0, TILE)
            if TABLE:
                mask_id = tl.load(mask_ids + line * mask_width + j // SPLIT)
                keep = table_mask(
                    masks, mask_id, tl.arange(0, BLOCK_Q), (j % SPLIT) * TILE, BLOCK_Q, BLOCK_K, TILE, False
                )  # fmt: skip
            elif CAUSAL:
                keep = (q_offset + at_q)[:, None] >= k_rows[None, :]
            else:
                keep = (at_q >= 0)[:, None] & (k_rows >= 0)[None, :]
            bias = tl.load(biases + line * width + j // SPLIT) * LOG2E if BIAS else 0.0
            gate = _gate(gate_at, at_q, k_rows, n_cols, q_offset, free) if GATE else 0.0
            acc, m, l = _accumulate(
                acc, m, l, q, k_at, v_at, k_rows, n_cols, d_mask, keep, bias, gate, stride_kt, stride_vt, scale_log2,
                True, True, BLOCK_D != DIM, GATE, PRECISION, WIDEN,
            )  # fmt: skip
        for j in range(partial, count):
            block = tl.load(indices + line * width + j // SPLIT)
            k_rows = block * BLOCK_K + (j % SPLIT) * TILE + tl.arange(0, TILE)
            bias = tl.load(biases + line * width + j // SPLIT) * LOG2E if BIAS else 0.0
            gate = _gate(gate_at, at_q, k_rows, n_cols, q_offset, free) if GATE else 0.0
            acc, m, l = _accumulate(
                acc, m, l, q, k_at, v_at, k_rows, n_cols, d_mask, False, bias, gate, stride_kt, stride_vt, scale_log2,
                SPANS, False, BLOCK_D != DIM, GATE, PRECISION, WIDEN,
            )  # fmt: skip
        out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
        o_at = o_ptr + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
        o_at += (start + at_q).to(tl.int64)[:, None] * stride_os + at_d[None, :]
        tl.store(o_at, out.to(o_ptr.dtype.element_ty), mask=q_mask)
        lse = (m + tl.log2(l)) * LN2
        lse_at = lse_ptr + batch.to(tl.int64) * stride_lb + head.to(tl.int64) * n_queries + start + at_q
        tl.store(lse_at, tl.where(l == 0.0, float("-inf"), lse), mask=at_q < n_rows)


def default_tile(dim: int, block_k: int) -> Tile:
    """The best or within 5 % of it on an H100, over padded, gated, masked and plain prompts of 2,048 to 32,768 tokens.

    Head sizes of 80 and 96 would be 4 to 8 % faster with 128 keys, 8 warps and 2 stages, which take 128 KiB of shared
    memory; power at 128 by 15 % with 64 keys and 2 stages.
    """
    if dim <= 64:
        return Tile(min(64, block_k), warps=4, stages=3)
    # Twice the result of a query needs twice the warps to hold it.
    return Tile(min(32, block_k), warps=4, stages=3) if dim <= 128 else Tile(min(32, block_k), warps=8, stages=2)


def launch(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, partials: Tensor, indices: Tensor,
    mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None, ends: Tensor | None,
    block_q: int, block_k: int, q_offset: int, causal: bool, scale: float, tile: Tile | None = None,
    biases: Tensor | None = None, gates: Tensor | None = None, free: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs the kernel; arguments and result as in `block_sparse_prefill`, head dimensions contiguous."""
    batch, heads, n_queries, dim = q.shape
    spans = starts is not None and ends is not None
    tile = tile or default_tile(dim, block_k)
    # Rows outside a sequence are written by nobody, so they start as what they shall be.
    out = torch.zeros_like(q) if spans else torch.empty_like(q)
    lse = q.new_full((batch, heads, n_queries), float("-inf"), dtype=torch.float32)
    nothing = counts
    sequences = len(starts) if spans else batch
    # Sequences that lie one behind another in one row begin at the same place and differ in `starts`.
    apart = int(sequences == batch)
    _prefill[(counts.shape[1], heads, sequences)](
        q, k, v, out, lse, counts, partials, indices,
        nothing if mask_ids is None else mask_ids, nothing if masks is None else masks,
        starts if spans else nothing, ends if spans else nothing, nothing if biases is None else biases,
        lse if gates is None else gates, free,
        apart * q.stride(0), q.stride(1), q.stride(2), apart * k.stride(0), k.stride(1), k.stride(2),
        apart * v.stride(0), v.stride(1), v.stride(2), apart * out.stride(0), out.stride(1), out.stride(2),
        apart * heads * n_queries, apart * k.shape[1] * k.shape[2],
        counts.shape[1] if counts.shape[0] > 1 else 0, indices.shape[2], 0 if mask_ids is None else mask_ids.shape[2],
        n_queries, k.shape[2], q_offset, scale * _device.LOG2E,
        GROUP=heads // k.shape[1], DIM=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_Q=block_q,
        BLOCK_K=block_k, TILE=tile.keys, TABLE=masks is not None, CAUSAL=causal, SPANS=spans,
        BIAS=biases is not None, GATE=gates is not None,
        **precision(q),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse
