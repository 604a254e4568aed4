"""Shapes and tolerances of sparse decode, shared by tests and benchmark."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit_kernels.block_sparse_prefill.cases import LSE_ABSOLUTE as LSE_ABSOLUTE
from prunekit_kernels.block_sparse_prefill.cases import RELATIVE as RELATIVE
from prunekit_kernels.block_sparse_prefill.cases import relative_error as relative_error
from prunekit_kernels.sparse_decode.lists import PageLists

# What a case reads: everything; some pages of each head; the same pages for all heads of a sequence; one token a list;
# lengths from nothing to everything.
READS = ("all", "some", "shared", "one", "ragged")
# Where: [B, G, S, D]; [P, page, G, D]; [P, page, 1, D], from which each head takes pages of its own.
CACHES = ("contiguous", "paged", "pool")


@dataclass(frozen=True)
class Case:
    """One shape."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    dim: int
    page: int = 16
    reads: str = "some"
    cache: str = "contiguous"
    queries: int = 1

    @property
    def name(self) -> str:
        """Shape and kind in one word, for test ids and benchmark rows."""
        return (
            f"B{self.batch}-H{self.heads}-G{self.kv_heads}-Q{self.queries}-S{self.tokens}-D{self.dim}"
            f"-page{self.page}-{self.reads}-{self.cache}"
        )


# Small enough for an interpreter, ragged everywhere; every head size, page kind, cache and kind of list.
SMALL = (
    Case(2, 4, 2, 63, 64, 16, "all"),
    Case(1, 6, 2, 100, 80, 1, "some", "paged"),
    Case(1, 3, 3, 100, 96, 64, "ragged", "pool"),
    Case(2, 8, 1, 300, 128, 32, "shared", "paged"),
    Case(1, 4, 4, 150, 256, 24, "some"),
    Case(2, 6, 2, 130, 64, 1, "one", "pool"),
    Case(2, 4, 2, 200, 128, 16, "ragged", "paged", queries=3),
    Case(1, 9, 3, 1000, 64, 128, "some", queries=2),
    Case(1, 2, 1, 4097, 128, 64, "all", "paged"),
)
# For a GPU: what models have.
LARGE = (
    *SMALL,
    *(
        Case(batch, heads, kv_heads, tokens, dim, page, reads, cache)
        for batch, heads, kv_heads, dim in ((3, 32, 8, 128), (2, 9, 3, 64))
        for tokens in (63, 1000, 4097)
        for page, reads, cache in ((1, "some", "pool"), (16, "ragged", "paged"), (64, "all", "contiguous"))
    ),
    Case(2, 32, 8, 4097, 128, 16, "shared", "paged"),
    Case(40, 32, 8, 1000, 128, 16, "ragged"),
    Case(2, 64, 8, 1000, 128, 16, "some", queries=8),
    Case(1, 32, 1, 4097, 128, 64, "all"),
)


def random_case(seed: int, largest: int = 700) -> Case:
    """A shape drawn from a seed, the same on every machine."""
    draw = random.Random(seed)
    kv_heads = draw.randint(1, 3)
    group = draw.choice((1, 2, 3, 4, 7, 8))
    return Case(
        batch=draw.randint(1, 3), heads=kv_heads * group, kv_heads=kv_heads, tokens=draw.randint(1, largest),
        dim=draw.choice((64, 80, 96, 128, 256)), page=draw.choice((1, 1, 2, 16, 24, 32, 64, 128, 256)),
        reads=draw.choice(READS), cache=draw.choice(CACHES), queries=draw.choice((1, 1, 1, 2, 5)),
    )  # fmt: skip


def _counts(case: Case, generator: torch.Generator) -> Tensor:
    """Tokens that each list reads, [B, G]."""
    shape = (case.batch, 1 if case.reads == "shared" else case.kv_heads)
    if case.reads == "one":
        counts = torch.ones(shape, dtype=torch.int32)
    elif case.reads == "all":
        counts = torch.full(shape, case.tokens, dtype=torch.int32)
    else:
        fewest = 0 if case.reads == "ragged" else 1
        most = case.tokens if case.reads == "ragged" else max(1, case.tokens // 3)
        counts = torch.randint(fewest, most + 1, shape, generator=generator, dtype=torch.int32)
        if case.reads == "ragged":
            counts.view(-1)[-1] = 0
            counts.view(-1)[0] = case.tokens
    return counts.expand(case.batch, case.kv_heads).contiguous()


def _lists(case: Case, generator: torch.Generator) -> tuple[PageLists, int]:
    """Lists of distinct random pages, and how many pages there are; the last page is in no list."""
    counts = _counts(case, generator)
    per_list = -(-case.tokens // case.page)
    paged = case.cache != "contiguous"
    owners = case.batch * (case.kv_heads if case.cache == "pool" else 1) if paged else 1
    n_pages = owners * per_list
    # Pages that two lists share are as good as pages of their own, so each draws from all.
    rows = [[torch.randperm(n_pages, generator=generator)[:per_list] for _ in range(case.kv_heads)] for _ in counts]
    if case.reads == "shared":
        rows = [[row[0]] * case.kv_heads for row in rows]
    flat, starts = [torch.tensor([n_pages])], torch.zeros_like(counts)
    for b, heads in enumerate(rows):
        for g, row in enumerate(heads):
            starts[b, g] = starts[b, g - 1] if case.reads == "shared" and g else sum(map(len, flat))
            # What follows a list names the page that nobody may read.
            flat += [row[: -(-int(counts[b, g]) // case.page)], torch.tensor([n_pages, n_pages])]
    return PageLists(
        indices=torch.cat(flat).to(torch.int32), starts=starts, tokens=counts, page_tokens=case.page, paged=paged,
        longest=max(1, int(counts.max())), total=int(counts.sum()),
    ), n_pages + 1  # fmt: skip


def _listed_only(cache: Tensor, lists: PageLists) -> Tensor:
    """The cache with NaN wherever no list reads."""
    kept = torch.full_like(cache, float("nan"))
    for b, (starts, counts) in enumerate(zip(lists.starts.tolist(), lists.tokens.tolist(), strict=True)):
        for g, (start, count) in enumerate(zip(starts, counts, strict=True)):
            place = torch.arange(count)
            pages = lists.indices[start + place // lists.page_tokens].long()
            slots = place % lists.page_tokens
            if lists.paged:
                where = (pages, slots, torch.tensor(g if cache.shape[2] > 1 else 0))
            else:
                where = (torch.tensor(b), torch.tensor(g), pages * lists.page_tokens + slots)
            kept[where] = cache[where]
    return kept


def make(case: Case, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor, PageLists]:
    """Random queries, a cache with NaN in all that no list reads, and lists followed by pages that must not be read."""
    generator = torch.Generator().manual_seed(seed)
    lists, n_pages = _lists(case, generator)
    if case.cache == "contiguous":
        shape = (case.batch, case.kv_heads, n_pages * case.page, case.dim)
    else:
        shape = (n_pages, case.page, 1 if case.cache == "pool" else case.kv_heads, case.dim)
    k, v = (_listed_only(torch.randn(shape, generator=generator).to(dtype), lists).to(device) for _ in range(2))
    # Stored [B, Q, H, D] and transposed, as models hand them over.
    q = torch.randn(case.batch, case.queries, case.heads, case.dim, generator=generator).to(dtype)
    return q.to(device).transpose(1, 2), k, v, lists.to(device)
