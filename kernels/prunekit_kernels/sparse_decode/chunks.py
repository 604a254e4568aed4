"""Into how many chunks a decode step cuts its lists."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

# In tokens read by one program while all are busy. Starting a program costs about as much as its first 64 tokens, the
# joining kernel as much as 80, and each chunk that it joins as much as one.
START_TOKENS, JOIN_TOKENS = 64, 80
MAX_CHUNKS = 512
# Programs of a cluster, most first, and the part of a card's SMs on which clusters of so many find room at a time: on
# an H100 14 clusters of eight and 24 of four ran side by side, 16 and 32 did not. Where pairs would take more than nine
# tenths of the SMs, one program a list is no slower.
CLUSTERS = ((8, 0.85), (4, 0.75), (2, 0.9), (1, 1.0))
# Part of the SMs that is busy, at least, and how many tokens a program may read for clusters to win there.
CLUSTER_TOKENS = ((0.6, 2048), (0.45, 1024), (0.2, 256), (0.0, 128))
ALONE_TOKENS = 4096


class Chunks(NamedTuple):
    """`n` chunks of `tokens` tokens each; the last chunk of a list may be shorter."""

    n: int
    tokens: int


def _times(n_lists: int, longest: int, total: int, step: int, slots: int) -> list[tuple[Chunks, int]]:
    """Every cut worth a thought, fewest chunks first, with its expected time in tokens read by one program."""
    steps = max(1, -(-longest // step))
    # Shorter lists have fewer chunks: programs without one leave at once.
    listed = min(1.0, total / max(1, n_lists * longest))
    found = []
    for width in sorted({-(-steps // n) for n in range(1, min(steps, MAX_CHUNKS) + 1)}, reverse=True):
        n = -(-steps // width)
        waves = max(1, math.ceil(n_lists * n * listed / slots))
        read = waves * (min(width * step, longest) + START_TOKENS)
        found.append((Chunks(n, width * step), read + (JOIN_TOKENS + n if n > 1 else 0)))
    return found


@functools.lru_cache(maxsize=4096)
def choose_chunks(n_lists: int, longest: int, total: int, step: int, slots: int) -> Chunks:
    """The fewest chunks within 5 % of the shortest expected time.

    Programs run in waves of `slots`. Few long lists are cut until they fill one wave; enough lists to fill the card
    are cut only if that evens out the last wave.

    Args:
        n_lists: sequences times key-value heads.
        longest: tokens of the longest list.
        total: tokens of all lists.
        step: tokens a program reads at a time; a chunk is a multiple of it.
        slots: programs that the card runs at a time.
    """
    found = _times(n_lists, longest, total, step, slots)
    limit = 1.05 * min(time for _, time in found)
    return next(chunks for chunks, time in found if time <= limit)


def cluster_chunks(n_lists: int, longest: int, step: int, processors: int) -> Chunks | None:
    """The cut where a cluster of programs for each list, each with an SM to itself, is the fastest way; else None.

    Measured on an H100 with 2 to 128 lists of 512 to 8,192 tokens beside the portable kernel.

    Args:
        n_lists: sequences times key-value heads.
        longest: tokens of the longest list.
        step: a chunk is a multiple of so many tokens.
        processors: SMs of the card.
    """
    for n, part in CLUSTERS:
        programs = n * n_lists
        if programs <= part * processors:
            tokens = -(-max(1, longest) // (n * step)) * step
            limit = ALONE_TOKENS if n == 1 else next(t for busy, t in CLUSTER_TOKENS if programs >= busy * processors)
            return Chunks(n, tokens) if tokens <= limit else None
    return None
