"""Page summaries in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunekit_kernels.page_summaries.kept import KeptPages


def bounds_reference(x: Tensor, page_tokens: int) -> tuple[Tensor, Tensor]:
    """What `page_bounds` returns."""
    pages = -(-x.shape[2] // page_tokens)
    missing = pages * page_tokens - x.shape[2]
    low = pad(x, (0, 0, 0, missing), value=float("inf")).unflatten(2, (pages, page_tokens)).amin(3)
    high = pad(x, (0, 0, 0, missing), value=float("-inf")).unflatten(2, (pages, page_tokens)).amax(3)
    return low, high


def means_reference(x: Tensor, block_tokens: int) -> Tensor:
    """What `block_means` returns, summed in float32."""
    blocks = -(-x.shape[2] // block_tokens)
    missing = blocks * block_tokens - x.shape[2]
    sums = pad(x.float(), (0, 0, 0, missing)).unflatten(2, (blocks, block_tokens)).sum(3)
    sums[:, :, :-1] /= block_tokens
    sums[:, :, -1] /= block_tokens - missing
    return sums.to(x.dtype)


def page_scores_reference(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """What `page_scores` returns, in the dtype of `q` until the sum of both products."""
    mine = q.squeeze(2).unflatten(1, (low.shape[1], -1))
    bounds = mine.clamp(min=0) @ high.transpose(2, 3) + mine.clamp(max=0) @ low.transpose(2, 3)
    return bounds.float().amax(2)


def renew_reference(x: Tensor, filled: Tensor, kept: KeptPages) -> None:
    """What `renew_pages` does; it asks the device how many keys there are."""
    page, lengths = kept.newest.shape[2], filled.tolist()
    for b, n in enumerate(lengths):
        for g, covered in enumerate(kept.covered[b].tolist()):
            keys, newest = x[b, g, :n], kept.newest[b, g]
            old = keys[max(0, covered - page) : covered]
            good = 0 < covered <= n and torch.equal(old, newest[page - len(old) :])
            kept.first[b, g] = (covered - 1) // page if good else 0
            last = keys[max(0, n - page) :]
            newest[page - len(last) :] = last
    first = int(kept.first.min())
    for b, n in enumerate(lengths):
        made = x[b : b + 1, :, first * page : n]
        if made.shape[2]:
            fresh = (means_reference(made, page),) if len(kept.summaries) == 1 else bounds_reference(made, page)
            for all_pages, part in zip(kept.summaries, fresh, strict=True):
                all_pages[b, :, first : first + part.shape[2]] = part[0]
    kept.covered[:] = filled[:, None]
