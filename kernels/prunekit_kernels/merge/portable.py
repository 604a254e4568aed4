"""The log-sum-exp merge in Triton."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["n_rows"])
def _merge(
    a_ptr, a_lse, b_ptr, b_lse, out_ptr, lse_ptr, n_rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < n_rows
    at_d = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64)[:, None] * DIM + at_d[None, :]
    load = real[:, None] & (at_d < DIM)[None, :]
    first = tl.load(a_lse + row, mask=real, other=0.0)
    second = tl.load(b_lse + row, mask=real, other=0.0)
    top = tl.maximum(first, second)
    safe = tl.where(top == float("-inf"), 0.0, top)
    wa = tl.exp(first - safe)
    wb = tl.exp(second - safe)
    total = wa + wb
    whole = tl.where(total == 0.0, 1.0, total)
    a = tl.load(a_ptr + at, mask=load, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=load, other=0.0).to(tl.float32)
    out = a * (wa / whole)[:, None] + b * (wb / whole)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=load)
    tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), safe + tl.log(whole)), mask=real)


def launch(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the kernel; arguments and result as in `merge_attention`."""
    a, b, a_lse, b_lse = a.contiguous(), b.contiguous(), a_lse.contiguous(), b_lse.contiguous()
    out, lse = torch.empty_like(a), torch.empty_like(a_lse)
    dim = a.shape[-1]
    rows = 16
    _merge[(triton.cdiv(lse.numel(), rows),)](
        a, a_lse, b, b_lse, out, lse, lse.numel(), DIM=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=rows
    )
    return out, lse
