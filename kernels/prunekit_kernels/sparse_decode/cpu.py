"""Decode over page lists on a CPU: listed tokens are gathered, or read in place where they lie in a row.

Shapes: B sequences, H query heads, G key-value heads, Q queries a sequence, D head size, P pages.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from prunekit_kernels._cpu import flash


def decode(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, starts: Tensor, tokens: Tensor,
    page_tokens: int, paged: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `sparse_decode` returns, in float32, or in float64 if the queries are; see there for the arguments."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries, kv_heads = q.shape[2], starts.shape[1]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32)
    by_head = [t.unflatten(1, (kv_heads, -1)) for t in (q, out, lse)]
    for b, (first, counts) in enumerate(zip(starts.tolist(), tokens.tolist(), strict=True)):
        caches = (k, v) if paged else (k[b], v[b])
        for heads in _alike(first, counts):
            start, count = first[heads.start], counts[heads.start]
            if not count:
                continue
            pages = indices[start : start - (-count // page_tokens)]
            mine = by_head[0][b, heads].flatten(1, 2).to(kind)
            keys, values = (_listed(t, pages, count, page_tokens, paged, heads).to(kind) for t in caches)
            found, sums = flash(mine[None], keys[None], values[None], scale, mask=_ends(mine, count, queries))
            by_head[1][b, heads] = found[0].unflatten(1, (-1, queries)).to(q.dtype)
            by_head[2][b, heads] = sums[0].unflatten(1, (-1, queries)).float()
    return out, lse


def _alike(first: list[int], counts: list[int]) -> list[slice]:
    """Neighbouring key-value heads of one sequence that share a list."""
    lists = list(zip(first, counts, strict=True))
    edges = [0, *(g for g in range(1, len(lists)) if lists[g] != lists[g - 1]), len(lists)]
    return [slice(*edge) for edge in pairwise(edges)]


def _listed(cache: Tensor, pages: Tensor, count: int, page_tokens: int, paged: bool, heads: slice) -> Tensor:
    """The listed tokens [heads, count, D] of one sequence, in the order of the list."""
    if paged:
        wide = cache.expand(-1, -1, heads.stop, -1) if cache.shape[2] == 1 else cache
        return wide[:, :, heads].index_select(0, pages).flatten(0, 1)[:count].transpose(0, 1)
    first = int(pages[0])
    if len(pages) == 1 or bool((pages.diff() == 1).all()):
        return cache[heads, first * page_tokens : first * page_tokens + count]
    places = (pages[:, None] * page_tokens + torch.arange(page_tokens)).flatten()[:count]
    found = cache.new_empty(heads.stop - heads.start, count, cache.shape[-1])
    for each, into in zip(cache[heads], found, strict=True):
        torch.index_select(each, 0, places, out=into)
    return found


def _ends(q: Tensor, count: int, queries: int) -> Tensor | None:
    """What is added to the scores of [G, R Q, D], because query i of Q leaves out the last Q - 1 - i tokens."""
    if queries == 1:
        return None
    hidden = torch.arange(count) >= count - queries + 1 + torch.arange(queries)[:, None]
    added = torch.zeros(queries, count, dtype=q.dtype).masked_fill(hidden, float("-inf"))
    return added.repeat(q.shape[1] // queries, 1)[None, None]
