"""Cache compaction as a torch operation: the reference on a CPU, the kernel on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunekit_kernels._device import no_kernels
from prunekit_kernels.cache_compact.reference import compact_reference
from prunekit_kernels.sparse_decode.lists import PageLists


class Compact(NamedTuple):
    """A compacted cache.

    Args:
        k: pool of pages [P, page_tokens, 1, D]; `v` alike.
        lists: which pages each sequence and key-value head owns, as `sparse_decode` takes them.
    """

    k: Tensor
    v: Tensor
    lists: PageLists


@torch.library.custom_op("prunekit::cache_compact", mutates_args=())
def _compact(
    k: Tensor, v: Tensor, indices: Tensor, starts: Tensor, tokens: Tensor, pages: Tensor,
    page_tokens: int, paged: bool, new_page: int, n_pages: int, longest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if no_kernels(k):
        return compact_reference(k, v, indices, starts, tokens, pages, page_tokens, paged, new_page, n_pages)
    from prunekit_kernels.cache_compact import portable

    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    return portable.launch(k, v, indices, starts, tokens, pages, page_tokens, paged, new_page, n_pages, longest)


@_compact.register_fake
def _compact_fake(
    k: Tensor, v: Tensor, indices: Tensor, starts: Tensor, tokens: Tensor, pages: Tensor,
    page_tokens: int, paged: bool, new_page: int, n_pages: int, longest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return tuple(cache.new_empty((n_pages, new_page, 1, cache.shape[-1])) for cache in (k, v))  # type: ignore[return-value]


def cache_compact(k: Tensor, v: Tensor, lists: PageLists, *, page_tokens: int = 16) -> Compact:
    """Copies the tokens that lists name into a paged cache of no others, in the order of the lists.

    The result holds about as many tokens as the lists name, each head its own number: what it saves is memory, once
    the old cache is let go. It waits for the device once, to know how many pages that is.

    Args:
        k: contiguous cache [B, G, S, D], or a paged one, as for `sparse_decode`; `v` alike.
        lists: tokens or pages that stay, by sequence and key-value head.
        page_tokens: tokens of a page of the result.
    Returns:
        Pools and their lists; slots of a last page that hold no token are zero. No gradient.
    Raises:
        ValueError: if the caches differ in shape, or do not fit the lists.
    """
    batch, kv_heads = lists.starts.shape
    fits = k.shape[1] == lists.page_tokens and k.shape[2] in (1, kv_heads) if lists.paged else (
        k.shape[:2] == (batch, kv_heads)
    )  # fmt: skip
    if k.shape != v.shape or not fits:
        kind = "paged" if lists.paged else "contiguous"
        raise ValueError(f"{kind} caches {list(k.shape)} and {list(v.shape)} do not fit lists of {batch} x {kv_heads}")
    counts = (lists.tokens + page_tokens - 1) // page_tokens
    ends = counts.flatten().cumsum(0).to(torch.int32)
    first = (ends - counts.flatten()).view(batch, kv_heads).to(torch.int32)
    n_pages, longest, total = (int(n) for n in torch.stack([ends[-1], lists.tokens.max(), lists.tokens.sum()]).tolist())
    pools = _compact(
        k, v, lists.indices, lists.starts, lists.tokens, first, lists.page_tokens, lists.paged, page_tokens, n_pages,
        longest,
    )  # fmt: skip
    made = PageLists(
        indices=torch.arange(n_pages, dtype=torch.int32, device=k.device), starts=first, tokens=lists.tokens,
        page_tokens=page_tokens, paged=True, longest=longest, total=total,
    )  # fmt: skip
    return Compact(*pools, made)
