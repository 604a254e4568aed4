"""Permuting tokens as a torch operation: indexing on a CPU, the kernel on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunekit_kernels._device import no_kernels


@torch.library.custom_op("prunekit::permute_tokens", mutates_args=())
def _permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    if no_kernels(x) or x.stride(-1) != 1:
        return x.index_select(2, order.long()).contiguous()
    from prunekit_kernels.permute import portable

    return portable.launch(x, order)


@_permute.register_fake
def _permute_fake(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, order, inverse = inputs
    ctx.save_for_backward(order, inverse)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    order, inverse = ctx.saved_tensors
    return _permute(grad, inverse, order), None, None


_permute.register_autograd(_gradients, setup_context=_remember)


def permute_tokens(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Tokens in another order.

    Args:
        x: [B, H, T, D].
        order: int32 [T], which token goes to each place, each exactly once.
        inverse: int32 [T], to which place each token goes.
    Returns:
        [B, H, T, D], contiguous, with gradients with respect to `x`.
    """
    return _permute(x, order, inverse)
