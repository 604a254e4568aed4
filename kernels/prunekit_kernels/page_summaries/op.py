"""Page summaries as torch operations: the reference on a CPU, the kernel on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit_kernels._device import HALF, no_kernels
from prunekit_kernels.page_summaries.kept import KeptPages
from prunekit_kernels.page_summaries.reference import (
    bounds_reference,
    means_reference,
    page_scores_reference,
    renew_reference,
)

MAX_PAGE = 256


def _takes(x: Tensor, tokens: int) -> bool:
    """Whether the kernel covers the case: powers of two on a GPU."""
    return not no_kernels(x) and x.stride(-1) == 1 and tokens & (tokens - 1) == 0 and tokens <= MAX_PAGE


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


@torch.library.custom_op("prunekit::page_scores", mutates_args=())
def _scores(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    half = q.dtype in HALF and low.dtype == high.dtype == q.dtype
    if no_kernels(q) or not half or not (q.stride(-1) == low.stride(-1) == high.stride(-1) == 1):
        return page_scores_reference(q, low, high)
    from prunekit_kernels.page_summaries import portable

    return portable.bounds_scores(q, low, high)


@_scores.register_fake
def _scores_fake(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return low.new_empty(low.shape[:3], dtype=torch.float32)


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


def page_scores(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The largest product that a query can have with a key within the bounds of each page.

    Args:
        q: queries of a step [B, H, 1, D].
        low: smallest values [B, G, P, D], G dividing H; `high` largest ones.
    Returns:
        float32 [B, G, P], of the H / G query heads of a key-value head the largest.
    """
    return _scores(q, low, high)


def can_renew(x: Tensor, page_tokens: int) -> bool:
    """Whether summaries of a cache can be kept without asking the device anything, or where asking costs nothing."""
    return not x.is_cuda or (_takes(x, page_tokens) and x.dtype in HALF)


def renew_pages(x: Tensor, filled: Tensor, kept: KeptPages) -> None:
    """Brings kept summaries up to the keys that a cache holds now, in place.

    Pages that were full are left alone if the cache holds at least as many keys as then and the newest of then, as many
    as a page has, are still where they were, in all sequences and heads. Otherwise all are made again. On a GPU nothing
    is asked of the device, so that a captured step decides this anew in each replay.

    Args:
        x: keys [B, G, T, D], of which `can_renew` is true.
        filled: int32 [B], how many of the T each sequence holds, 1 or more.
        kept: with room for all pages of them.
    """
    if not x.is_cuda:
        return renew_reference(x, filled, kept)
    from prunekit_kernels.page_summaries import portable

    return portable.renew(x, filled, kept)
