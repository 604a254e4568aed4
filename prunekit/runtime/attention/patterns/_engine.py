"""From one elementwise rule to block lists, dense mask and density.

A pattern says which keys a query reads, by position; everything else follows here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from prunekit_kernels.block_sparse_prefill import BlockLists
from prunekit_kernels.block_sparse_prefill.lists import pack_bits

CHUNK_BLOCKS = 256
EMPTY, PARTIAL, FULL = 0, 1, 2


class Pattern(Protocol):
    """A static pattern: which keys a query may read, from the two positions alone."""

    paper: ClassVar[tuple[str, str]]

    @property
    def causal(self) -> bool:
        """Whether keys after the query are hidden."""
        ...

    def __hash__(self) -> int: ...

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """True where the query at position `q` reads the key at position `k`; integer tensors that broadcast."""
        ...

    def key_ranges(self, first: int, last: int, n_keys: int) -> Iterable[tuple[int, int]]:
        """Ranges (start, end) of keys outside which no query from `first` to `last`, both included, reads.

        For a pattern with an order of its own, slots instead of positions.
        """
        ...


def dense_mask(
    pattern: Pattern, n_queries: int, n_keys: int, q_offset: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Bool [queries, keys], true where query `i`, at position `q_offset + i`, reads a key."""
    q = torch.arange(q_offset, q_offset + n_queries, device=device)[:, None]
    return pattern.allows(q, torch.arange(n_keys, device=device)[None, :])


def block_lists(
    pattern: Pattern, n_queries: int, n_keys: int, q_offset: int = 0, block_q: int = 128, block_k: int = 128,
    device: torch.device | str = "cpu",
) -> BlockLists:  # fmt: skip
    """Lists of the key blocks that each block of queries reads, one for all heads.

    Within a row the masked blocks come first, then the full ones, both from the nearest key to the farthest. A pattern
    with an `order` of its own, of tokens in slots, gets lists of slots: see `order_of`.

    Args:
        pattern: the rule.
        q_offset: position of the first query among the keys.
        block_q: queries of a block, a multiple of 16.
        block_k: keys of a block, a multiple of 32.
        device: where the lists are computed and stay.
    """
    order = order_of(pattern, n_keys)
    order = None if order is None else order.to(device)
    rows, cols = _candidates(pattern, n_queries, n_keys, q_offset, block_q, block_k)
    kinds, tables, pairs, plain = [], [], 0, True
    for first in range(0, len(rows), CHUNK_BLOCKS):
        at = slice(first, first + CHUNK_BLOCKS)
        row, col = rows[at].to(device), cols[at].to(device)
        i = (row[:, None] * block_q + torch.arange(block_q, device=device))[:, :, None]
        k = (col[:, None] * block_k + torch.arange(block_k, device=device))[:, None, :]
        q = q_offset + i
        if order is None:
            seen = pattern.allows(q, k) & (k < n_keys)
        else:
            seen = pattern.allows(order[q.clamp(max=n_keys - 1)], order[k.clamp(max=n_keys - 1)]) & (k < n_keys)
        beyond = i >= n_queries
        counted = seen & ~beyond
        pairs += int(counted.sum())
        kind = torch.where((seen | beyond).flatten(1).all(1), FULL, PARTIAL)
        kind = torch.where(counted.flatten(1).any(1), kind, EMPTY)
        expected = ((k <= q) if pattern.causal else (k >= 0)) & (k < n_keys)
        usual = ((seen == expected) | beyond).flatten(1).all(1)
        plain &= bool((usual | (kind != PARTIAL)).all())
        kinds.append(kind.cpu())
        tables.append(pack_bits(seen[kind == PARTIAL]).cpu())
    kind = torch.cat(kinds)
    ids, masks = (None, None) if plain else _unique(torch.cat(tables))
    counts, partials, indices, mask_ids = _assemble(rows, cols, kind, ids, -(-n_queries // block_q))
    return BlockLists(
        counts=counts[None], partials=partials[None], indices=indices[None],
        mask_ids=None if mask_ids is None else mask_ids[None], masks=masks, block_q=block_q, block_k=block_k,
        n_queries=n_queries, n_keys=n_keys, q_offset=q_offset, causal=pattern.causal, pairs=pairs,
        shortest=int(counts.min()),
    ).to(device)  # fmt: skip


def order_of(pattern: Pattern, n_tokens: int) -> Tensor | None:
    """Position of the token in each slot of the blocks, int64, or None if slots and positions are the same.

    Queries, keys and values go to the kernel in this order, and the result back.
    """
    order = getattr(pattern, "order", None)
    found: Tensor | None = None if order is None else order(n_tokens)
    return found


def density(pattern: Pattern, n_tokens: int) -> float:
    """Share of the query-key pairs of dense attention over `n_tokens` that the pattern keeps."""
    dense = n_tokens * (n_tokens + 1) // 2 if pattern.causal else n_tokens * n_tokens
    return block_lists(pattern, n_tokens, n_tokens).pairs / dense


def _candidates(
    pattern: Pattern, n_queries: int, n_keys: int, q_offset: int, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """Row and column of every block that may hold a visible pair."""
    rows: list[int] = []
    cols: list[int] = []
    for row in range(-(-n_queries // block_q)):
        first = q_offset + row * block_q
        last = q_offset + min((row + 1) * block_q, n_queries) - 1
        mine: set[int] = set()
        for start, end in pattern.key_ranges(first, last, n_keys):
            start, end = max(start, 0), min(end, n_keys)
            if start < end:
                mine.update(range(start // block_k, (end - 1) // block_k + 1))
        rows.extend([row] * len(mine))
        cols.extend(sorted(mine))
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(cols, dtype=torch.int64)


def _unique(tables: Tensor) -> tuple[Tensor, Tensor]:
    """Number of each packed mask among the distinct ones, and the distinct ones."""
    known: dict[bytes, int] = {}
    first: list[int] = []
    ids = []
    for at, table in enumerate(tables.numpy()):
        key = table.tobytes()
        if key not in known:
            known[key] = len(known)
            first.append(at)
        ids.append(known[key])
    return torch.tensor(ids, dtype=torch.int32), tables[first]


def _assemble(
    rows: Tensor, cols: Tensor, kind: Tensor, ids: Tensor | None, n_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Counts, partial counts, indices and mask numbers of the rows, partial blocks first, near keys first."""
    all_ids = torch.zeros(len(rows), dtype=torch.int32)
    if ids is not None:
        all_ids[kind == PARTIAL] = ids
    listed = kind != EMPTY
    rows, cols, kind, all_ids = rows[listed], cols[listed], kind[listed], all_ids[listed]
    n_cols = int(cols.max()) + 1 if len(cols) else 1
    order = torch.argsort((rows * 2 + (kind == FULL)) * n_cols + n_cols - 1 - cols)
    rows, cols, kind, all_ids = rows[order], cols[order], kind[order], all_ids[order]
    counts = torch.bincount(rows, minlength=n_rows)
    partials = torch.bincount(rows[kind == PARTIAL], minlength=n_rows)
    slot = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    indices = torch.zeros(n_rows, max(int(counts.max()), 1), dtype=torch.int32)
    indices[rows, slot] = cols.to(torch.int32)
    mask_ids = None
    if ids is not None:
        mask_ids = torch.zeros(n_rows, max(int(partials.max()), 1), dtype=torch.int32)
        part = kind == PARTIAL
        mask_ids[rows[part], slot[part]] = all_ids[part]
    return counts.to(torch.int32), partials.to(torch.int32), indices, mask_ids
