"""Cache compaction in Triton, for any GPU it compiles for and for its interpreter.

One program copies one stretch of one list, keys and values together. It moves bits, so every type goes.

Shapes: B sequences, G key-value heads, D head size.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekit_kernels.sparse_decode.portable import strides


@triton.jit
def _copy(
    k_ptr, v_ptr, k_out, v_out, indices, starts, tokens, pages,
    stride_kb, stride_kg, stride_kp, stride_kt, stride_vb, stride_vg, stride_vp, stride_vt,
    PAGE: tl.constexpr, NEW_PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    kv = tl.program_id(1)
    batch = tl.program_id(2)
    line = batch * tl.num_programs(1) + kv
    n_tokens = tl.load(tokens + line)
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    # The last page is filled up with zeros, so that no slot of the pool is left as it was.
    end = (n_tokens + NEW_PAGE - 1) // NEW_PAGE * NEW_PAGE
    if tl.program_id(0) * TILE < end:
        at_d = tl.arange(0, BLOCK_D)
        real = place < n_tokens
        page = tl.load(indices + tl.load(starts + line) + place // PAGE, mask=real, other=0).to(tl.int64)
        slot = place % PAGE
        load = real[:, None] & (at_d < DIM)[None, :]
        k_at = k_ptr + batch.to(tl.int64) * stride_kb + kv.to(tl.int64) * stride_kg + at_d[None, :]
        v_at = v_ptr + batch.to(tl.int64) * stride_vb + kv.to(tl.int64) * stride_vg + at_d[None, :]
        k = tl.load(k_at + (page * stride_kp + slot * stride_kt)[:, None], mask=load, other=0)
        v = tl.load(v_at + (page * stride_vp + slot * stride_vt)[:, None], mask=load, other=0)
        row = tl.load(pages + line).to(tl.int64) * NEW_PAGE + place
        store = (place < end)[:, None] & (at_d < DIM)[None, :]
        tl.store(k_out + row[:, None] * DIM + at_d[None, :], k, mask=store)
        tl.store(v_out + row[:, None] * DIM + at_d[None, :], v, mask=store)


def launch(
    k: Tensor, v: Tensor, indices: Tensor, starts: Tensor, tokens: Tensor, pages: Tensor,
    page_tokens: int, paged: bool, new_page: int, n_pages: int, longest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs the kernel; arguments as in the operation, head dimensions contiguous."""
    batch, kv_heads = starts.shape
    dim = k.shape[-1]
    pools = [torch.empty(n_pages, new_page, 1, dim, dtype=cache.dtype, device=cache.device) for cache in (k, v)]
    tile = 64
    most = -(-longest // new_page) * new_page
    if n_pages:
        _copy[(triton.cdiv(most, tile), kv_heads, batch)](
            k, v, *pools, indices.contiguous(), starts.contiguous(), tokens.contiguous(), pages.contiguous(),
            *strides(k, page_tokens, paged), *strides(v, page_tokens, paged),
            PAGE=page_tokens, NEW_PAGE=new_page, DIM=dim, BLOCK_D=triton.next_power_of_2(dim), TILE=tile, num_warps=4,
        )  # fmt: skip
    return pools[0], pools[1]
