"""Permuting tokens in Triton, for any GPU it compiles for and for its interpreter: each byte read and written once."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["heads", "n_tokens"])
def _permuted(
    x_ptr, order, out_ptr, stride_b, stride_h, stride_t, heads, n_tokens,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at_d = tl.arange(0, BLOCK_D)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    token = tl.load(order + at, mask=at < n_tokens, other=0).to(tl.int64)
    mask = (at < n_tokens)[:, None] & (at_d < DIM)[None, :]
    x_at = x_ptr + batch * stride_b + head * stride_h + token[:, None] * stride_t + at_d[None, :]
    out_at = out_ptr + (tl.program_id(1).to(tl.int64) * n_tokens + at)[:, None] * DIM + at_d[None, :]
    tl.store(out_at, tl.load(x_at, mask=mask), mask=mask)


def launch(x: Tensor, order: Tensor) -> Tensor:
    """Runs the kernel; arguments and result as in `permute_tokens`, head dimension contiguous."""
    batch, heads, n_tokens, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_d = triton.next_power_of_2(dim)
    rows = max(1, 8192 // block_d)
    _permuted[(triton.cdiv(n_tokens, rows), batch * heads)](
        x, order, out, x.stride(0), x.stride(1), x.stride(2), heads, n_tokens,
        DIM=dim, BLOCK_D=block_d, ROWS=rows, num_warps=4,
    )  # fmt: skip
    return out
