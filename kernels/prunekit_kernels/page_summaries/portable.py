"""Page summaries in Triton, for any GPU it compiles for and for its interpreter.

Shapes: B batch, G heads, T tokens, D head size, P pages.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["heads", "n_tokens", "n_pages"])
def _summaries(
    x_ptr, first_ptr, second_ptr, stride_b, stride_g, stride_t, heads, n_tokens, n_pages,
    PAGE: tl.constexpr, PAGES: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    page = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    token = tl.program_id(0) * PAGES * PAGE + tl.arange(0, PAGES * PAGE)
    at_d = tl.arange(0, BLOCK_D)
    x_at = x_ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_g
    x_at += token.to(tl.int64)[:, None] * stride_t + at_d[None, :]
    load = (token < n_tokens)[:, None] & (at_d < DIM)[None, :]
    out = (tl.program_id(1).to(tl.int64) * n_pages + page)[:, None] * DIM + at_d[None, :]
    store = (page < n_pages)[:, None] & (at_d < DIM)[None, :]
    if MEAN:
        x = tl.load(x_at, mask=load, other=0.0).to(tl.float32)
        sums = tl.sum(tl.reshape(x, [PAGES, PAGE, BLOCK_D]), 1)
        count = tl.minimum(n_tokens - page * PAGE, PAGE).to(tl.float32)
        tl.store(first_ptr + out, (sums / count[:, None]).to(first_ptr.dtype.element_ty), mask=store)
    else:
        # In float32, which holds every half value, because the interpreter compares bfloat16 by its bits.
        x = tl.load(x_at, mask=load, other=0.0).to(tl.float32)
        low = tl.min(tl.reshape(tl.where(load, x, float("inf")), [PAGES, PAGE, BLOCK_D]), 1)
        high = tl.max(tl.reshape(tl.where(load, x, float("-inf")), [PAGES, PAGE, BLOCK_D]), 1)
        tl.store(first_ptr + out, low.to(first_ptr.dtype.element_ty), mask=store)
        tl.store(second_ptr + out, high.to(second_ptr.dtype.element_ty), mask=store)


def launch(x: Tensor, page_tokens: int, mean: bool) -> tuple[Tensor, Tensor]:
    """Means twice, or smallest and largest values, [B, G, P, D]."""
    batch, heads, n_tokens, dim = x.shape
    n_pages = -(-n_tokens // page_tokens)
    first = x.new_empty((batch, heads, n_pages, dim))
    second = first if mean else torch.empty_like(first)
    pages = max(1, 64 // page_tokens)
    _summaries[(triton.cdiv(n_pages, pages), batch * heads)](
        x, first, second, x.stride(0), x.stride(1), x.stride(2), heads, n_tokens, n_pages,
        PAGE=page_tokens, PAGES=pages, DIM=dim, BLOCK_D=triton.next_power_of_2(dim), MEAN=mean, num_warps=4,
    )  # fmt: skip
    return first, second
