"""Launches the Hopper decode kernel: layouts of a cluster and a grid of one a list."""

# mypy: ignore-errors
from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl

from prunekit_kernels._device import LOG2E
from prunekit_kernels.sparse_decode.chunks import Chunks
from prunekit_kernels.sparse_decode.hopper import sparse_decode_hopper
from prunekit_kernels.sparse_decode.portable import strides

WARPS = 4
# Keys and values that a program has on their way.
IN_FLIGHT_BYTES = 192 * 1024


@functools.cache
def _layouts(programs: int, places: int, heads: int, dim: int) -> dict[str, object]:
    """Layouts of the kernel. The last bases say whether programs of a cluster hold rows of their own or the same."""
    bits = programs.bit_length() - 1
    own = [[1 << bit, 0] for bit in range(bits)]

    def same(rank: int) -> list[list[int]]:
        return [[0] * rank for _ in range(bits)]

    lanes = dim // 8
    return {
        "ASK": gl.BlockedLayout([1, 8], [32 // lanes, lanes], [WARPS, 1], [1, 0], cga_layout=own),
        "COPY": gl.BlockedLayout([1, 8], [32 // lanes, lanes], [WARPS, 1], [1, 0], cga_layout=same(2)),
        "MMA": gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8], cga_layout=own),
        "PLACES": gl.BlockedLayout([max(1, places // (32 * WARPS))], [32], [WARPS], [0], cga_layout=same(1)),
        "JOIN": gl.BlockedLayout(
            [programs, 1, 4], [1, 128 // dim, dim // 4], [1, WARPS, 1], [2, 1, 0], cga_layout=same(3)
        ),
        "LINE": gl.SwizzledSharedLayout(1, 1, 1, [0], cga_layout=same(1)),
        "TILES": gl.SwizzledSharedLayout(8, 1, 8, [1, 0], cga_layout=same(2)),
    }


def launch(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, starts: Tensor, tokens: Tensor,
    page_tokens: int, paged: bool, chunks: Chunks, scale: float, tile: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs the kernel; arguments and result as in `sparse_decode`, cut as `cluster_chunks` says.

    Args:
        tile: tokens a step; None for 128, or 64 in chunks of no more.
    """
    batch, heads, queries, dim = q.shape
    kv_heads = starts.shape[1]
    group = heads // kv_heads
    n_lists = batch * kv_heads
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    alone = chunks.n == 1
    part = out if alone else q.new_empty((n_lists, chunks.n, group, dim), dtype=torch.float32)
    part_lse = lse if alone else q.new_empty((n_lists, chunks.n, group), dtype=torch.float32)
    stride_b, stride_g, _, stride_t = strides(k, page_tokens, paged)
    tile = tile or (64 if chunks.tokens <= 64 else 128)
    places = max(tile, triton.next_power_of_2(chunks.tokens))
    rows = max(4, triton.next_power_of_2(group))
    sparse_decode_hopper[(1, n_lists)](
        q, k, v, out, lse, part, part_lse, indices.contiguous(), starts.contiguous(), tokens.contiguous(),
        q.stride(0), q.stride(1), stride_b, stride_g, stride_t, chunks.tokens, kv_heads, group, scale * LOG2E,
        DIM=dim, HEADS=rows, PAGE=page_tokens, TILE=tile, CHUNK=places, STAGES=IN_FLIGHT_BYTES // (4 * dim * tile),
        PROGRAMS=chunks.n, **_layouts(chunks.n, places, rows, dim), num_warps=WARPS, num_ctas=chunks.n,
    )  # fmt: skip
    return out, lse
