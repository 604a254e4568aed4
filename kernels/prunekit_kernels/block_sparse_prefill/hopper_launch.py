"""Launches the Hopper kernel: tensor descriptors and a persistent grid."""

# mypy: ignore-errors
from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from prunekit_kernels._device import LOG2E, multiprocessors
from prunekit_kernels.block_sparse_prefill.hopper import block_sparse_prefill_hopper

STAGES = 2


@functools.cache
def _cache_bytes(index: int) -> int:
    """Bytes of the L2 cache."""
    return torch.cuda.get_device_properties(index).L2_cache_size


def _descriptor(tensor: Tensor, rows: int, layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, tensor.shape[-1]], layout)


def launch(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, partials: Tensor, indices: Tensor,
    mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None, ends: Tensor | None, q_offset: int,
    causal: bool, scale: float, pingpong: bool = True, rows_first: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs the kernel; arguments and result as in `block_sparse_prefill`, every row listing at least one block.

    Args:
        pingpong: whether the two warpgroups take turns at starting matrix work, which was 1 to 2 % faster on an H200.
        rows_first: whether all heads of a row of blocks come before the next row; None for yes where keys and values
            fit the L2 cache: 3 % faster for one sequence of 8,192 tokens on an H100, 2 to 5 % slower for two or more.
    """
    batch, heads, n_queries, dim = q.shape
    n_kv_heads = k.shape[1]
    rows = counts.shape[1]
    spans = starts is not None and ends is not None
    # Rows outside a sequence are written by nobody, so they start as what they shall be.
    out = torch.zeros_like(q) if spans else torch.empty_like(q)
    lse = q.new_empty((batch, heads, n_queries), dtype=torch.float32)
    if spans:
        lse.fill_(float("-inf"))
    sequences = len(starts) if spans else batch
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    n_tiles = rows * heads * sequences
    device = q.device.index or 0
    if rows_first is None:
        rows_first = k.nbytes + v.nbytes < _cache_bytes(device)
    nothing = counts
    block_sparse_prefill_hopper[(min(n_tiles, multiprocessors(device)),)](
        _descriptor(q, 64, layout), _descriptor(k, 128, layout), _descriptor(v, 128, layout),
        _descriptor(out, 64, layout), out, lse, counts, partials, indices, nothing if mask_ids is None else mask_ids,
        nothing if masks is None else masks, starts if spans else nothing, ends if spans else nothing,
        rows if counts.shape[0] > 1 else 0, indices.shape[2], 0 if mask_ids is None else mask_ids.shape[2], n_tiles,
        rows, heads, heads // n_kv_heads, n_kv_heads, n_queries, k.shape[2], q_offset, int(sequences == batch),
        out.stride(0), out.stride(1), out.stride(2), scale * LOG2E, CAUSAL=causal, TABLE=masks is not None,
        STAGES=STAGES, PINGPONG=pingpong, DIM=dim, ROWS_FIRST=rows_first, SPANS=spans, num_warps=4,
    )  # fmt: skip
    return out, lse
