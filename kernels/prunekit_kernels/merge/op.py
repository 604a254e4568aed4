"""The log-sum-exp merge as a torch operation."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit_kernels._device import no_kernels


def merge_reference(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """What `merge_attention` returns, in plain torch."""
    lse = torch.logaddexp(a_lse, b_lse)
    safe = lse.masked_fill(lse == float("-inf"), 0.0)
    kind = torch.promote_types(a.dtype, torch.float32)
    out = a.to(kind) * (a_lse - safe).exp().unsqueeze(-1) + b.to(kind) * (b_lse - safe).exp().unsqueeze(-1)
    return out.to(a.dtype), lse


@torch.library.custom_op("prunekit::merge_attention", mutates_args=())
def _merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    if no_kernels(a):
        return merge_reference(a, a_lse, b, b_lse)
    from prunekit_kernels.merge import portable

    return portable.launch(a, a_lse, b, b_lse)


@_merge.register_fake
def _merge_fake(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(a_lse)


def merge_attention(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Joins attention over one set of keys with attention over another, disjoint one.

    Args:
        a: output [..., D] over the first set; `b` alike over the second.
        a_lse: its log-sum-exp float32 [...], natural logarithm, minus infinity where no key was read; `b_lse` alike.
    Returns:
        Output in the dtype of `a` and log-sum-exp over both sets. Two empty sets give zeros and minus infinity.
    Raises:
        ValueError: if the shapes differ.
    """
    if a.shape != b.shape or a_lse.shape != a.shape[:-1] or b_lse.shape != a_lse.shape:
        raise ValueError(f"results {list(a.shape)}, {list(b.shape)} and sums {list(a_lse.shape)}, {list(b_lse.shape)}"
                         " do not fit each other")  # fmt: skip
    return _merge(a, a_lse, b, b_lse)
