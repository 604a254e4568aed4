"""What the Triton kernels share: matrix products in the precision of a launch, and log2(e)."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekit_kernels import _device

LOG2E = tl.constexpr(_device.LOG2E)


@triton.jit
def dot(a, b, c, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """The product of `a` and `b`, added to `c` unless that is None, in float32."""
    if WIDEN:
        c = tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision=PRECISION)
    else:
        c = tl.dot(a, b, c, input_precision=PRECISION)
    return c


def precision(like: Tensor) -> dict[str, object]:
    """Options of `dot` for a launch on tensors of this type and place."""
    return {
        "PRECISION": "ieee" if like.dtype == torch.float32 else "tf32",
        # Triton's interpreter multiplies the bit patterns of bfloat16.
        "WIDEN": like.dtype == torch.bfloat16 and not like.is_cuda,
    }
