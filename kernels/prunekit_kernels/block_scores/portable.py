"""Block scores and block choice in Triton, for any GPU it compiles for and for its interpreter.

Shapes: B batch, H query heads, G key-value heads, S queries, T keys, D head size, R query blocks, C key blocks.
"""

# mypy: ignore-errors
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekit_kernels._device import LOG2E
from prunekit_kernels._triton import dot, precision

# How blocks are chosen: so many, the fewest that reach a share of the score, or all above zero.
TOP, MASS, POSITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Tiles of folded queries whose programs lie side by side.
NEAR = 4


@triton.jit(do_not_specialize=["heads", "n_queries", "n_keys", "n_runs", "q_offset", "n_rows", "n_cols", "n_col_tiles"])
def _folded(
    q_ptr, k_ptr, lse_ptr, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt,
    heads, n_queries, n_keys, n_runs, q_offset, n_rows, n_cols, n_col_tiles, scale_log2,
    NEAR: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, CAUSAL: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (base two) of each folded row of queries over each block of INNER folded keys.

    Each row is the last of STEP runs of queries, or the last run of all. One product of ROWS folded queries and COLS
    folded keys, BLOCK_D of their STRIDE * D channels a time. Tiles that lie in the future are left unwritten.
    """
    PARTS: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    # Programs that run at a time: NEAR tiles of rows of the heads that share keys, by as many tiles of keys as fit, so
    # that what they read stays in the L2 cache.
    within = tl.program_id(0) % GROUP
    rest = tl.program_id(0) // GROUP
    row = (rest // (NEAR * n_col_tiles) * NEAR + rest % NEAR) * ROWS
    col = rest // NEAR % n_col_tiles * COLS
    kv_heads = heads // GROUP
    batch = tl.program_id(1) // kv_heads
    kv = tl.program_id(1) % kv_heads
    head = kv * GROUP + within
    future = False
    if CAUSAL:
        future = col * STRIDE > q_offset + (row + ROWS) * STEP * STRIDE - 1
    if (row < n_rows) & (not future):
        at_r = row + tl.arange(0, ROWS)
        # One past the last query of each row's run.
        end = tl.minimum((at_r + 1) * STEP, n_runs) * STRIDE
        at_c = col + tl.arange(0, COLS)
        at_d = tl.arange(0, BLOCK_D)
        q_at = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        k_at = k_ptr + batch.to(tl.int64) * stride_kb + kv.to(tl.int64) * stride_kh
        q_at += (end - 1).to(tl.int64)[:, None] * stride_qs + at_d[None, :]
        k_at += (at_c * STRIDE).to(tl.int64)[:, None] * stride_kt + at_d[None, :]
        s = tl.zeros([ROWS, COLS], tl.float32)
        for j in range(STRIDE * PARTS):
            q_mask = (end - 1 - j // PARTS < n_queries)[:, None]
            k_mask = (at_c * STRIDE + j // PARTS < n_keys)[:, None]
            if DIM % BLOCK_D != 0:
                q_mask = q_mask & (j % PARTS * BLOCK_D + at_d < DIM)[None, :]
                k_mask = k_mask & (j % PARTS * BLOCK_D + at_d < DIM)[None, :]
            q = tl.load(q_at - (j // PARTS) * stride_qs + j % PARTS * BLOCK_D, mask=q_mask, other=0.0)
            k = tl.load(k_at + (j // PARTS) * stride_kt + j % PARTS * BLOCK_D, mask=k_mask, other=0.0)
            s = dot(q, tl.trans(k), s, WIDEN, PRECISION)
        keep = (at_c * STRIDE < n_keys)[None, :] & (at_r >= 0)[:, None]
        if CAUSAL:
            keep = keep & ((at_c * STRIDE)[None, :] <= (q_offset + end - 1)[:, None])
        s = tl.reshape(tl.where(keep, s * scale_log2, float("-inf")), [ROWS, COLS // INNER, INNER])
        m = tl.max(s, 2)
        safe = tl.where(m == float("-inf"), 0.0, m)
        total = tl.sum(tl.exp2(s - safe[:, :, None]), 2)
        block = col // INNER + tl.arange(0, COLS // INNER)
        line = (batch * heads + head).to(tl.int64) * n_rows + at_r
        store = (at_r < n_rows)[:, None] & (block < n_cols)[None, :]
        lse_at = lse_ptr + line[:, None] * n_cols + block[None, :]
        tl.store(lse_at, tl.where(total == 0.0, float("-inf"), safe + tl.log2(total)), mask=store)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "n_blocks", "q_offset"])
def _summed(
    lse_ptr, out_ptr, n_rows, n_cols, n_blocks, q_offset,
    INNER: tl.constexpr, COLS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Softmax of INNER folded rows over all blocks of keys, summed over the rows."""
    line = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * INNER + tl.arange(0, INNER)
    col = tl.arange(0, COLS)
    load = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    if CAUSAL:
        # Blocks that lie in the future of all rows are unwritten.
        load = load & (col * BLOCK_K < q_offset + (tl.program_id(0) + 1) * BLOCK_Q)[None, :]
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
    if MODE == POSITIVE:
        chosen = forced | (seen & (s > 0.0))
    else:
        bits = s.to(tl.int32, bitcast=True)
        # Signed integers in the order of the floats.
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = tl.where(forced, 2147483647, tl.where(seen, key, -2147483648))
        n_seen = tl.sum(seen.to(tl.int32), 0)
        wanted = tl.maximum(tl.minimum(keep, n_seen), tl.sum(forced.to(tl.int32), 0))
        counted = tl.where(seen, s, 0.0)
        goal = tl.sum(counted, 0) * mass
        low = tl.full([], -2147483648, tl.int64)
        high = tl.full([], 2147483648, tl.int64)
        if MODE == TOP:
            # Two thresholds a turn: their counts, at most 2 ** 14 each, share one sum. Blocks that are not seen have
            # the least key, below any threshold.
            while high - low > 1:
                third = tl.maximum((high - low) // 3, 1)
                first_at, second_at = low + third, low + 2 * third
                total = tl.sum(
                    (key >= first_at.to(tl.int32)).to(tl.int32)
                    + ((key >= tl.minimum(second_at, 2147483647).to(tl.int32)).to(tl.int32) << 16), 0,
                )  # fmt: skip
                first_n = total & 0xFFFF
                second_n = tl.where(second_at < high, total >> 16, -1)
                high = tl.where(second_n >= wanted, high, tl.where(first_n >= wanted, tl.minimum(second_at, high),
                                first_at))  # fmt: skip
                low = tl.where(second_n >= wanted, second_at, tl.where(first_n >= wanted, first_at, low))
                # A threshold that exactly the wanted blocks reach ends the search.
                exact = tl.where(first_n == wanted, first_at, second_at)
                done = (first_n == wanted) | (second_n == wanted)
                low = tl.where(done, exact, low)
                high = tl.where(done, exact + 1, high)
        else:
            for _ in range(32):
                middle = (low + high) >> 1
                enough = tl.sum(tl.where(key >= middle.to(tl.int32), counted, 0.0), 0) >= goal
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
        if MODE == TOP:
            least = low.to(tl.int32)
            chosen = seen & (key >= least)
            too_many = tl.sum(chosen.to(tl.int32), 0) - wanted
            if too_many > 0:
                # Of equal blocks the nearer, which has the larger number, comes first.
                equal = seen & (key == least)
                chosen = chosen & ((equal == 0) | (tl.cumsum(equal.to(tl.int32), 0) > too_many))
        else:
            chosen = seen & (key >= low.to(tl.int32))
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


@dataclass(frozen=True)
class Tile:
    """How scoring is laid out: folded queries and keys of a program, channels of a step, warps, stages."""

    rows: int
    cols: int
    channels: int
    warps: int
    stages: int


def default_tile(dim: int, on_gpu: bool) -> Tile:
    """128 folded queries by 256 folded keys, which is what keeps the tensor cores busy."""
    if not on_gpu:
        return Tile(32, 32, triton.next_power_of_2(dim), 4, 2)
    return Tile(128, 256, 64, 8, 3) if dim % 64 == 0 else Tile(128, 128, triton.next_power_of_2(dim), 8, 3)


def folded(
    q: Tensor, k: Tensor, stride: int, step: int, block_q: int, block_k: int, q_offset: int, causal: bool,
    scale: float, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Runs the scoring kernels; arguments and result as in `antidiagonal_scores`; `default_tile` if None is given."""
    batch, heads, n_queries, dim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    cols = -(-n_keys // block_k)
    n_runs = -(-n_queries // stride)
    n_folded = -(-n_runs // step)
    inner = block_k // stride
    tile = tile or default_tile(dim, q.is_cuda)
    tile_cols = max(inner, tile.cols)
    lse = q.new_empty((batch, heads, n_folded, cols), dtype=torch.float32)
    group = heads // kv_heads
    row_tiles, col_tiles = triton.cdiv(n_folded, tile.rows), triton.cdiv(cols * inner, tile_cols)
    _folded[(triton.cdiv(row_tiles, NEAR) * NEAR * col_tiles * group, batch * kv_heads)](
        q, k, lse, q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        heads, n_queries, n_keys, n_runs, q_offset, n_folded, cols, col_tiles, scale / stride * LOG2E,
        NEAR=NEAR, GROUP=group, DIM=dim, BLOCK_D=tile.channels, STRIDE=stride, STEP=step, ROWS=tile.rows,
        COLS=tile_cols, INNER=inner, CAUSAL=causal, **precision(q), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return summed(lse, n_queries, stride * step, block_q, block_k, q_offset, causal)


def summed(lse: Tensor, n_queries: int, inner: int, block_q: int, block_k: int, q_offset: int, causal: bool) -> Tensor:
    """Scores [B, H, R, C] from log-sum-exps [B, H, folded queries, C], each of which stands for `inner` queries."""
    batch, heads, n_folded, cols = lse.shape
    rows = -(-n_queries // block_q)
    out = torch.empty((batch, heads, rows, cols), dtype=torch.float32, device=lse.device)
    _summed[(rows, batch * heads)](
        lse, out, n_folded, cols, rows, q_offset, INNER=block_q // inner, COLS=triton.next_power_of_2(cols),
        BLOCK_Q=block_q, BLOCK_K=block_k, CAUSAL=causal, num_warps=8,
    )  # fmt: skip
    return out


def select(
    scores: Tensor, block_q: int, block_k: int, n_queries: int, n_keys: int, q_offset: int, causal: bool,
    keep: int, mass: float, sink: int, window: int, width: int, ascending: bool, warps: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Runs the choosing kernel; arguments and result as in `select_blocks`; default warps if 0."""
    rows, cols = scores.shape[-2:]
    lines = scores.numel() // cols
    counts = torch.empty(scores.shape[:-1], dtype=torch.int32, device=scores.device)
    partials = torch.empty_like(counts)
    indices = torch.empty((*scores.shape[:-1], width), dtype=torch.int32, device=scores.device)
    size = triton.next_power_of_2(cols)
    _select[(lines,)](
        scores.contiguous(), counts, partials, indices, rows, cols, width, n_queries, n_keys, q_offset, keep, mass,
        sink, window, BLOCK_Q=block_q, BLOCK_K=block_k, CAUSAL=causal,
        MODE=(TOP if keep > 0 else MASS if mass > 0 else POSITIVE).value, ASCENDING=ascending, COLS=size,
        num_warps=warps or min(8, max(1, size // 512)),
    )  # fmt: skip
    return counts, partials, indices
