"""Folded scores for Hopper in Gluon: one producer warp, two warpgroups of matrix work, persistent programs.

A program walks tiles of ROWS folded queries by COLS folded keys. The producer copies CHANNELS channels of both at a
time into a ring with the tensor copy engine; each consumer warpgroup owns half of the queries, and while one of them
computes exponentials the other may run ahead by as many copies as the ring holds.

Shapes: B batch, H query heads, G key-value heads, D head size.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from prunekit_kernels._device import LOG2E, multiprocessors
from prunekit_kernels.block_scores.reference import scored_runs

# Folded queries of a tile and of each of its two consumers, folded keys of a tile, channels of both in one copy.
ROWS, OWN_ROWS, COLS, CHANNELS = gl.constexpr(128), gl.constexpr(64), gl.constexpr(256), gl.constexpr(64)
# Copies that are on their way at a time.
STAGES = 4


@gluon.jit
def _place(t, per_kv, n_col_tiles, kv_heads, GROUP: gl.constexpr, NEAR: gl.constexpr):
    """First folded query, first folded key, batch, query head and key-value head of tile `t`.

    Tiles side by side: the heads that share keys, NEAR tiles of queries, then the tiles of keys, so that what programs
    read at a time stays in the L2 cache.
    """
    kv = t // per_kv
    rest = t % per_kv
    within = rest % GROUP
    rest = rest // GROUP
    row = (rest // (NEAR * n_col_tiles) * NEAR + rest % NEAR) * ROWS
    col = rest // NEAR % n_col_tiles * COLS
    kv_head = kv % kv_heads
    return row, col, kv // kv_heads, kv_head * GROUP + within, kv_head


@gluon.jit
def _wanted(row, col, n_rows, q_offset, STRIDE: gl.constexpr, STEP: gl.constexpr, CAUSAL: gl.constexpr):
    """Whether any score of a tile is seen."""
    seen = row < n_rows
    if CAUSAL:
        seen = seen & (col * STRIDE <= q_offset + (row + ROWS) * STEP * STRIDE - 1)
    return seen


@gluon.jit
def _produce(
    q_desc, k_desc, q_smem, k_smem, full, empty, n_tiles, per_kv, n_col_tiles, kv_heads, n_rows, q_offset, q_last,
    GROUP: gl.constexpr, NEAR: gl.constexpr, DIM: gl.constexpr, STRIDE: gl.constexpr, STEP: gl.constexpr,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies the folded queries and keys of each tile, CHANNELS at a time."""
    PARTS: gl.constexpr = DIM // CHANNELS
    step = 0
    for t in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        row, col, batch, head, kv_head = _place(t, per_kv, n_col_tiles, kv_heads, GROUP, NEAR)
        if _wanted(row, col, n_rows, q_offset, STRIDE, STEP, CAUSAL):
            for j in range(STRIDE * PARTS):
                slot = step % STAGES
                mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(slot), 2 * q_desc.block_type.nbytes + k_desc.block_type.nbytes)
                token = j // PARTS
                channel = j % PARTS * CHANNELS
                for half in gl.static_range(2):
                    place = q_smem.index(slot * 2 + half)._reinterpret(
                        q_desc.dtype, [1, 1, OWN_ROWS, 1, CHANNELS], q_desc.layout
                    )
                    tma.async_copy_global_to_shared(
                        q_desc, [batch, head, row + half * OWN_ROWS, q_last - token, channel], full.index(slot), place
                    )
                place = k_smem.index(slot)._reinterpret(k_desc.dtype, [1, 1, COLS, 1, CHANNELS], k_desc.layout)
                tma.async_copy_global_to_shared(k_desc, [batch, kv_head, col, token, channel], full.index(slot), place)
                step += 1


@gluon.jit
def _consume(
    lse_ptr, q_smem, k_smem, full, empty, n_tiles, per_kv, n_col_tiles, heads, kv_heads, n_rows, n_cols, n_keys,
    n_runs, q_offset, scale_log2,
    GROUP: gl.constexpr, NEAR: gl.constexpr, DIM: gl.constexpr, STRIDE: gl.constexpr, STEP: gl.constexpr,
    INNER: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Log-sum-exps of OWN_ROWS folded queries over blocks of INNER folded keys, tile after tile."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    OUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    BLOCKS: gl.constexpr = COLS // INNER
    step = 0
    for t in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        row, col, batch, head, _kv_head = _place(t, per_kv, n_col_tiles, kv_heads, GROUP, NEAR)
        if _wanted(row, col, n_rows, q_offset, STRIDE, STEP, CAUSAL):
            zero = gl.zeros([OWN_ROWS, COLS], gl.float32, layout=LAYOUT)
            slot = step % STAGES
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            acc = warpgroup_mma(
                q_smem.index(slot * 2 + WHO), k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            step += 1
            for _ in range(1, STRIDE * (DIM // CHANNELS)):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), (step // STAGES) & 1)
                acc = warpgroup_mma(
                    q_smem.index(slot * 2 + WHO), k_smem.index(slot).permute((1, 0)), acc, is_async=True
                )
                acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
                mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
                step += 1
            s = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)

            first = row + WHO * OWN_ROWS
            # One past the last query of the first row's run; a tile in which that hides nothing needs no mask.
            least = gl.minimum((first + 1) * STEP, n_runs) * STRIDE
            hides = (col + COLS) * STRIDE > n_keys
            if CAUSAL:
                hides = hides | ((col + COLS - 1) * STRIDE > q_offset + least - 1)
            if hides:
                at_c = gl.expand_dims(col + gl.arange(0, COLS, layout=gl.SliceLayout(0, LAYOUT)), 0)
                keep = at_c * STRIDE < n_keys
                if CAUSAL:
                    at_r = gl.expand_dims(first + gl.arange(0, OWN_ROWS, layout=gl.SliceLayout(1, LAYOUT)), 1)
                    keep = keep & (at_c * STRIDE <= q_offset + gl.minimum((at_r + 1) * STEP, n_runs) * STRIDE - 1)
                s = gl.where(keep, s, float("-inf"))
            # The largest of the row serves all of its blocks: what is 2 ** 126 times smaller counts for nothing.
            m = gl.max(s, axis=1) * scale_log2
            safe = gl.where(m == float("-inf"), 0.0, m)
            p = gl.exp2(s * scale_log2 - gl.expand_dims(safe, 1))
            total = gl.convert_layout(gl.sum(gl.reshape(p, [OWN_ROWS, BLOCKS, INNER]), axis=2), OUT)
            most = gl.convert_layout(safe, gl.SliceLayout(1, OUT))
            lse = gl.where(total == 0.0, float("-inf"), gl.expand_dims(most, 1) + gl.log2(total))
            at_r = first + gl.arange(0, OWN_ROWS, layout=gl.SliceLayout(1, OUT))
            block = col // INNER + gl.arange(0, BLOCKS, layout=gl.SliceLayout(0, OUT))
            line = (batch * heads + head).to(gl.int64) * n_rows + at_r
            at = lse_ptr + gl.expand_dims(line, 1) * n_cols + gl.expand_dims(block, 0)
            gl.store(at, lse, mask=gl.expand_dims(at_r < n_rows, 1) & gl.expand_dims(block < n_cols, 0))


@gluon.jit(
    do_not_specialize=[
        "n_tiles", "per_kv", "n_col_tiles", "heads", "kv_heads", "n_rows", "n_cols", "n_keys", "n_runs", "q_offset",
        "q_last",
    ]
)  # fmt: skip
def folded_hopper(
    q_desc, k_desc, lse, n_tiles, per_kv, n_col_tiles, heads, kv_heads, n_rows, n_cols, n_keys, n_runs, q_offset,
    q_last, scale_log2,
    GROUP: gl.constexpr, NEAR: gl.constexpr, DIM: gl.constexpr, STRIDE: gl.constexpr, STEP: gl.constexpr,
    INNER: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Log-sum-exp (base two) of each folded row of queries over each block of INNER folded keys.

    Args:
        q_desc: tensor descriptor [B, H, rows, tokens, D], block [1, 1, OWN_ROWS, 1, CHANNELS]; folded from token
            `q_last` down.
        k_desc: tensor descriptor [B, G, runs, STRIDE, D], block [1, 1, COLS, 1, CHANNELS].
        lse: float32 [B, H, rows, blocks], written, but for tiles that lie in the future.
    """
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES * 2, OWN_ROWS, CHANNELS], flat)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, COLS, CHANNELS], flat)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    lse, q_smem, k_smem, full, empty, n_tiles, per_kv, n_col_tiles, heads, kv_heads, n_rows, n_cols,
                    n_keys, n_runs, q_offset, scale_log2, GROUP, NEAR, DIM, STRIDE, STEP, INNER, CAUSAL, STAGES, 0,
                ),
            ),
            (
                _consume,
                (
                    lse, q_smem, k_smem, full, empty, n_tiles, per_kv, n_col_tiles, heads, kv_heads, n_rows, n_cols,
                    n_keys, n_runs, q_offset, scale_log2, GROUP, NEAR, DIM, STRIDE, STEP, INNER, CAUSAL, STAGES, 1,
                ),
            ),
            (
                _produce,
                (
                    q_desc, k_desc, q_smem, k_smem, full, empty, n_tiles, per_kv, n_col_tiles, kv_heads, n_rows,
                    q_offset, q_last, GROUP, NEAR, DIM, STRIDE, STEP, CAUSAL, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def _runs(tensor: Tensor, size: int) -> Tensor:
    """The tokens [B, H, S, D] cut into runs, [B, H, R, size, D]; a copy with zeros behind if the last is not full."""
    missing = -tensor.shape[2] % size
    return (pad(tensor, (0, 0, 0, missing)) if missing else tensor).unflatten(2, (-1, size))


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, 1, CHANNELS.value], layout)


def log_sums(
    q: Tensor, k: Tensor, stride: int, step: int, block_k: int, q_offset: int, causal: bool, scale: float, near: int = 4
) -> Tensor:
    """Runs the kernel; arguments as in `antidiagonal_scores`.

    Args:
        near: tiles of queries whose programs lie side by side.
    Returns:
        float32 [B, H, scored runs, blocks of keys], base two; tiles that lie in the future are unwritten.
    """
    batch, heads, n_queries, dim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    n_runs, cols, inner = -(-n_queries // stride), -(-n_keys // block_k), block_k // stride
    n_rows = -(-n_runs // step)
    if n_queries % (stride * step):
        runs = _runs(q, stride)[:, :, scored_runs(n_runs, step, q.device)]
    else:
        runs = _runs(q, stride * step)
    lse = q.new_empty((batch, heads, n_rows, cols), dtype=torch.float32)
    group = heads // kv_heads
    row_tiles, col_tiles = triton.cdiv(n_rows, ROWS.value), triton.cdiv(cols * inner, COLS.value)
    per_kv = triton.cdiv(row_tiles, near) * near * col_tiles * group
    n_tiles = per_kv * batch * kv_heads
    folded_hopper[(min(n_tiles, multiprocessors(q.device.index or 0)),)](
        _descriptor(runs, OWN_ROWS.value), _descriptor(_runs(k, stride), COLS.value), lse, n_tiles, per_kv, col_tiles,
        heads, kv_heads, n_rows, cols, n_keys, n_runs, q_offset, runs.shape[3] - 1, scale / stride * LOG2E, GROUP=group,
        NEAR=near, DIM=dim, STRIDE=stride, STEP=step, INNER=inner, CAUSAL=causal, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return lse
