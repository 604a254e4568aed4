"""Block scores and block choice in Triton, for any GPU it compiles for and for its interpreter.

Shapes: B batch, H query heads, G key-value heads, S queries, T keys, D head size, R query blocks, C key blocks.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOP, MASS, POSITIVE = 0, 1, 2


@triton.jit(do_not_specialize=["heads", "n_queries", "n_keys", "q_offset", "n_rows", "n_cols"])
def _folded(
    q_ptr, k_ptr, lse_ptr, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt,
    heads, n_queries, n_keys, q_offset, n_rows, n_cols, scale_log2,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, INNER: tl.constexpr, CAUSAL: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (base two) of each folded row of queries over each block of INNER folded keys."""
    row = tl.program_id(0) * ROWS
    col = tl.program_id(1) * COLS
    batch = tl.program_id(2) // heads
    head = tl.program_id(2) % heads
    at_r = row + tl.arange(0, ROWS)
    at_c = col + tl.arange(0, COLS)
    block = col // INNER + tl.arange(0, COLS // INNER)
    line = tl.program_id(2).to(tl.int64) * n_rows + at_r
    store = (at_r < n_rows)[:, None] & (block < n_cols)[None, :]
    lse_at = lse_ptr + line[:, None] * n_cols + block[None, :]
    if CAUSAL and col * STRIDE > q_offset + (row + ROWS) * STRIDE - 1:
        tl.store(lse_at, tl.full([ROWS, COLS // INNER], float("-inf"), tl.float32), mask=store)
    else:
        at_d = tl.arange(0, BLOCK_D)
        q_at = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + at_d[None, :]
        k_at = k_ptr + batch.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kh + at_d[None, :]
        s = tl.zeros([ROWS, COLS], tl.float32)
        for j in range(STRIDE):
            q_row = at_r * STRIDE + STRIDE - 1 - j
            k_row = at_c * STRIDE + j
            q_mask = (q_row < n_queries)[:, None] & (at_d < DIM)[None, :]
            k_mask = (k_row < n_keys)[:, None] & (at_d < DIM)[None, :]
            q = tl.load(q_at + q_row.to(tl.int64)[:, None] * stride_qs, mask=q_mask, other=0.0)
            k = tl.load(k_at + k_row.to(tl.int64)[:, None] * stride_kt, mask=k_mask, other=0.0)
            if WIDEN:
                s = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), s, input_precision=PRECISION)
            else:
                s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
        keep = (at_c * STRIDE < n_keys)[None, :] & (at_r >= 0)[:, None]
        if CAUSAL:
            keep = keep & ((at_c * STRIDE)[None, :] <= (q_offset + (at_r + 1) * STRIDE - 1)[:, None])
        s = tl.reshape(tl.where(keep, s * scale_log2, float("-inf")), [ROWS, COLS // INNER, INNER])
        m = tl.max(s, 2)
        safe = tl.where(m == float("-inf"), 0.0, m)
        total = tl.sum(tl.exp2(s - safe[:, :, None]), 2)
        tl.store(lse_at, tl.where(total == 0.0, float("-inf"), safe + tl.log2(total)), mask=store)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "n_blocks"])
def _summed(lse_ptr, out_ptr, n_rows, n_cols, n_blocks, INNER: tl.constexpr, COLS: tl.constexpr):
    """Softmax of INNER folded rows over all blocks of keys, summed over the rows."""
    line = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * INNER + tl.arange(0, INNER)
    col = tl.arange(0, COLS)
    load = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    lse = tl.load(lse_ptr + (line * n_rows + row)[:, None] * n_cols + col[None, :], mask=load, other=float("-inf"))
    m = tl.max(lse, 1)
    w = tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m)[:, None])
    total = tl.sum(w, 1)
    w = w / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + (line * n_blocks + tl.program_id(0)) * n_cols + col, tl.sum(w, 0), mask=col < n_cols)


@triton.jit(
    do_not_specialize=["n_rows", "n_cols", "width", "n_queries", "n_keys", "q_offset", "keep", "sink", "window"]
)
def _select(
    scores, counts, partials, indices, n_rows, n_cols, width, n_queries, n_keys, q_offset, keep, mass, sink, window,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, MODE: tl.constexpr, ASCENDING: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """The list of one row of blocks, by bisection on the bits of the scores instead of sorting."""
    line = tl.program_id(0)
    row = line % n_rows
    c = tl.arange(0, COLS)
    s = tl.load(scores + line.to(tl.int64) * n_cols + c, mask=c < n_cols, other=0.0)
    first = q_offset + row * BLOCK_Q
    last = q_offset + tl.minimum((row + 1) * BLOCK_Q, n_queries) - 1
    seen = c < n_cols
    if CAUSAL:
        seen = seen & (c <= last // BLOCK_K)
    forced = seen & ((c < sink) | ((c > first // BLOCK_K - window) & (c < last // BLOCK_K + window)))
    if MODE == 2:
        chosen = forced | (seen & (s > 0.0))
    else:
        bits = s.to(tl.int32, bitcast=True)
        # Signed integers in the order of the floats.
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        key = tl.where(forced, 2147483647, tl.where(seen, key, -2147483648))
        n_seen = tl.sum(seen.to(tl.int32), 0)
        wanted = tl.maximum(tl.minimum(keep, n_seen), tl.sum(forced.to(tl.int32), 0))
        counted = tl.where(seen, s, 0.0)
        goal = tl.sum(counted, 0) * mass
        low = tl.full([], -2147483648, tl.int64)
        high = tl.full([], 2147483648, tl.int64)
        for _ in range(32):
            middle = (low + high) >> 1
            above = key >= middle
            if MODE == 0:
                enough = tl.sum((above & seen).to(tl.int32), 0) >= wanted
            else:
                enough = tl.sum(tl.where(above, counted, 0.0), 0) >= goal
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        if MODE == 0:
            sure = seen & (key > low)
            equal = seen & (key == low)
            n_equal = tl.sum(equal.to(tl.int32), 0)
            to_the_right = n_equal - tl.cumsum(equal.to(tl.int32), 0)
            chosen = sure | (equal & (to_the_right < wanted - tl.sum(sure.to(tl.int32), 0)))
        else:
            chosen = seen & (key >= low)
    masked = (c + 1) * BLOCK_K > n_keys
    if CAUSAL:
        masked = masked | (c * BLOCK_K + BLOCK_K - 1 > first)
    partial = chosen & masked
    n_partial = tl.sum(partial.to(tl.int32), 0)
    n_chosen = tl.sum(chosen.to(tl.int32), 0)
    if ASCENDING:
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    else:
        full = chosen & (masked == 0)
        behind = n_partial - tl.cumsum(partial.to(tl.int32), 0)
        after = n_chosen - tl.cumsum(full.to(tl.int32), 0)
        place = tl.where(partial, behind, after)
    tl.store(counts + line, n_chosen)
    tl.store(partials + line, n_partial)
    out = indices + line.to(tl.int64) * width
    tl.store(out + c, tl.zeros([COLS], tl.int32), mask=(c < width) & (c >= n_chosen))
    tl.store(out + place, c, mask=chosen & (place < width))


def folded(
    q: Tensor, k: Tensor, stride: int, block_q: int, block_k: int, q_offset: int, causal: bool, scale: float
) -> Tensor:
    """Runs the scoring kernels; arguments and result as in `antidiagonal_scores`."""
    batch, heads, n_queries, dim = q.shape
    n_keys = k.shape[2]
    rows, cols = -(-n_queries // block_q), -(-n_keys // block_k)
    n_folded = -(-n_queries // stride)
    inner = block_k // stride
    tile = 128 if q.is_cuda else 32
    tile_cols = max(inner, tile)
    out = q.new_empty((batch, heads, rows, cols), dtype=torch.float32)
    lse = q.new_empty((batch, heads, n_folded, cols), dtype=torch.float32)
    _folded[(triton.cdiv(n_folded, tile), triton.cdiv(cols * inner, tile_cols), batch * heads)](
        q, k, lse, q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        heads, n_queries, n_keys, q_offset, n_folded, cols, scale / stride * 1.4426950408889634,
        GROUP=heads // k.shape[1], DIM=dim, BLOCK_D=triton.next_power_of_2(dim), STRIDE=stride, ROWS=tile,
        COLS=tile_cols, INNER=inner, CAUSAL=causal, WIDEN=q.dtype == torch.bfloat16 and not q.is_cuda,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=8, num_stages=3,
    )  # fmt: skip
    _summed[(rows, batch * heads)](
        lse, out, n_folded, cols, rows, INNER=block_q // stride, COLS=triton.next_power_of_2(cols), num_warps=8
    )
    return out


def select(
    scores: Tensor, block_q: int, block_k: int, n_queries: int, n_keys: int, q_offset: int, causal: bool,
    keep: int, mass: float, sink: int, window: int, width: int, ascending: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Runs the choosing kernel; arguments and result as in `select_blocks`."""
    rows, cols = scores.shape[-2:]
    lines = scores.numel() // cols
    counts = torch.empty(scores.shape[:-1], dtype=torch.int32, device=scores.device)
    partials = torch.empty_like(counts)
    indices = torch.empty((*scores.shape[:-1], width), dtype=torch.int32, device=scores.device)
    size = triton.next_power_of_2(cols)
    _select[(lines,)](
        scores.contiguous(), counts, partials, indices, rows, cols, width, n_queries, n_keys, q_offset, keep, mass,
        sink, window, BLOCK_Q=block_q, BLOCK_K=block_k, CAUSAL=causal,
        MODE=TOP if keep > 0 else MASS if mass > 0 else POSITIVE, ASCENDING=ascending, COLS=size,
        num_warps=1 if size <= 512 else 4 if size <= 2048 else 8,
    )  # fmt: skip
    return counts, partials, indices
