"""Page summaries as torch operations: the reference on a CPU, the kernel on a GPU."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from prunekit_kernels.page_summaries.reference import bounds_reference, means_reference

MAX_PAGE = 256


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _takes(x: Tensor, tokens: int) -> bool:
    """Whether the kernel covers the case: powers of two on a GPU."""
    return x.is_cuda and _has_triton() and x.stride(-1) == 1 and tokens & (tokens - 1) == 0 and tokens <= MAX_PAGE


@torch.library.custom_op("prunekit::page_bounds", mutates_args=())
def _bounds(x: Tensor, page_tokens: int) -> tuple[Tensor, Tensor]:
    if not _takes(x, page_tokens):
        return bounds_reference(x, page_tokens)
    from prunekit_kernels.page_summaries import portable

    return portable.launch(x, page_tokens, mean=False)


@_bounds.register_fake
def _bounds_fake(x: Tensor, page_tokens: int) -> tuple[Tensor, Tensor]:
    low = x.new_empty((*x.shape[:2], -(-x.shape[2] // page_tokens), x.shape[3]))
    return low, torch.empty_like(low)


@torch.library.custom_op("prunekit::block_means", mutates_args=())
def _means(x: Tensor, block_tokens: int) -> Tensor:
    if not _takes(x, block_tokens):
        return means_reference(x, block_tokens)
    from prunekit_kernels.page_summaries import portable

    return portable.launch(x, block_tokens, mean=True)[0]


@_means.register_fake
def _means_fake(x: Tensor, block_tokens: int) -> Tensor:
    return x.new_empty((*x.shape[:2], -(-x.shape[2] // block_tokens), x.shape[3]))


def page_bounds(x: Tensor, page_tokens: int = 16) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel in each page of tokens.

    Args:
        x: keys [B, G, T, D].
        page_tokens: tokens of a page; the last page may hold fewer.
    Returns:
        Two tensors [B, G, P, D] in the dtype of `x`.
    """
    return _bounds(x, page_tokens)


def block_means(x: Tensor, block_tokens: int = 128) -> Tensor:
    """Mean over each block of tokens, [B, G, P, D] in the dtype of `x`; the last block may hold fewer tokens."""
    return _means(x, block_tokens)
