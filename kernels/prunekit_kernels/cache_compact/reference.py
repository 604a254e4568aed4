"""Cache compaction in plain torch, on any device."""

from __future__ import annotations

from torch import Tensor

from prunekit_kernels.sparse_decode.reference import listed


def compact_reference(
    k: Tensor, v: Tensor, indices: Tensor, starts: Tensor, tokens: Tensor, pages: Tensor,
    page_tokens: int, paged: bool, new_page: int, n_pages: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the kernel writes, from the same tensors: pools [n_pages, new_page, 1, D], zero where no token is."""
    pools = [cache.new_zeros(n_pages * new_page, cache.shape[-1]) for cache in (k, v)]
    first, count, page = starts.tolist(), tokens.tolist(), pages.tolist()
    for b in range(starts.shape[0]):
        for g in range(starts.shape[1]):
            for pool, cache in zip(pools, (k, v), strict=True):
                rows = listed(cache, indices, first[b][g], count[b][g], page_tokens, paged, b, g)
                pool[page[b][g] * new_page :][: len(rows)] = rows
    whole = [pool.view(n_pages, new_page, 1, -1) for pool in pools]
    return whole[0], whole[1]
