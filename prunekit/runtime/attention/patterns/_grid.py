"""Tokens that lie on a grid of one, two or three axes, row by row, perhaps after a few that do not.

A rule speaks of one axis at a time: which span of keys a query's coordinate sees there. The order of tiles puts tokens
that lie close on the grid into the same block, so that a window touches few blocks.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from prunekit.core.errors import UsageError

TILE_BITS = 7
# Of axis and coordinates: first key and one past the last.
Span = Callable[[int, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Grid:
    """A grid of tokens.

    Args:
        sizes: tokens along each axis; the last axis runs fastest.
        prefix: tokens before the grid, which read everything and are read by everything.
        dilation: along each axis, every so many tokens form a group of their own.
        tile: tokens along each axis that lie together in the order of tiles.
    """

    sizes: tuple[int, ...]
    prefix: int
    dilation: tuple[int, ...]
    tile: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of prefix and grid."""
        return self.prefix + prod(self.sizes)

    def require(self, n_tokens: int) -> None:
        """Refuses a sequence of another length.

        Raises:
            UsageError: naming both.
        """
        if n_tokens != self.tokens:
            raise UsageError(
                f"a grid of {' x '.join(map(str, self.sizes))} tokens after {self.prefix} others does not fit a"
                f" sequence of {n_tokens}",
                hint="set the pattern's `grid` and `prefix_tokens` to what the model reads",
            )

    def coordinates(self, position: Tensor) -> list[Tensor]:
        """Coordinates of positions along each axis; of the prefix those of the first token of the grid."""
        rest, found = (position - self.prefix).clamp(min=0), []
        for size in reversed(self.sizes):
            found.append(rest % size)
            rest = rest // size
        return found[::-1]

    def allows(self, q: Tensor, k: Tensor, span: Span) -> Tensor:
        """True where the key's coordinates lie in the spans of the query's, along each axis."""
        seen = torch.ones((), dtype=torch.bool, device=q.device)
        for axis, (i, j) in enumerate(zip(self.coordinates(q), self.coordinates(k), strict=True)):
            first, end = span(axis, i)
            d = self.dilation[axis]
            seen = seen & (j >= first) & (j < end) & (i % d == j % d)
        return seen | (q < self.prefix) | (k < self.prefix)

    def key_ranges(self, first: int, last: int, span: Span) -> Iterable[tuple[int, int]]:
        """Runs of slots, in the order of tiles, around what the slots from `first` to `last` see."""
        slots, order = self.slots, self.order
        q = order[first : last + 1]
        if bool((q < self.prefix).any()):
            yield 0, self.tokens
            return
        yield 0, self.prefix
        near = torch.zeros(1, dtype=torch.int64)
        for axis, i in enumerate(self.coordinates(q)):
            start, end = span(axis, i)
            along = torch.arange(max(0, int(start.min())), min(self.sizes[axis], int(end.max())))
            near = (near[:, None] * self.sizes[axis] + along).flatten()
        found = slots[near + self.prefix].sort().values
        cuts = (found.diff() > 1).nonzero().flatten()
        starts = torch.cat([found[:1], found[cuts + 1]])
        ends = torch.cat([found[cuts], found[-1:]]) + 1
        yield from zip(starts.tolist(), ends.tolist(), strict=True)

    @functools.cached_property
    def order(self) -> Tensor:
        """Position of the token in each slot, int64: prefix first, then group by group, tile by tile."""
        position = torch.arange(self.prefix, self.tokens)
        group = tile = inner = torch.zeros_like(position)
        for axis, i in enumerate(self.coordinates(position)):
            d, t = self.dilation[axis], self.tile[axis]
            along = i // d
            group = group * d + i % d
            tile = tile * (-(-self.sizes[axis] // (d * t))) + along // t
            inner = inner * t + along % t
        key = (group * (int(tile.max()) + 1) + tile) * (int(inner.max()) + 1) + inner
        return torch.cat([torch.arange(self.prefix), key.argsort() + self.prefix])

    @functools.cached_property
    def slots(self) -> Tensor:
        """Slot of each position, int64."""
        slots = torch.empty_like(self.order)
        slots[self.order] = torch.arange(self.tokens)
        return slots


def n_axes(grid: object) -> int:
    """How many axes a grid names.

    Raises:
        UsageError: for anything but one to three.
    """
    axes = len(grid) if isinstance(grid, list | tuple) else 0
    if not 1 <= axes <= 3:
        raise UsageError(f"`grid: {grid}` is no grid", why="it names the tokens along one to three axes")
    return axes


def per_axis(option: str, value: object, axes: int, least: int) -> tuple[int, ...]:
    """A whole number for each axis, from one number or one for each.

    Raises:
        UsageError: for anything else, or a number below `least`.
    """
    items = [value] * axes if isinstance(value, int) else list(value) if isinstance(value, list | tuple) else []
    whole = all(isinstance(item, int) and not isinstance(item, bool) and item >= least for item in items)
    if len(items) != axes or not whole:
        raise UsageError(
            f"`{option}: {value}` does not fit a grid of {axes} axes",
            why=f"it is one whole number of at least {least}, or one for each axis",
        )
    return tuple(items)


def best_tile(sizes: Sequence[int], reach: Sequence[int]) -> tuple[int, ...]:
    """The tile of 128 tokens whose queries reach into the fewest tiles, of those with powers of two along each axis.

    Args:
        sizes: tokens along each axis.
        reach: how far a query reads to either side along each axis.

    best_tile((128, 128), (16, 16)) = (8, 16): 5 by 3 tiles. best_tile((128, 128), (3, 3)) = (1, 128): 7 by 1.
    """

    def touched(tile: tuple[int, ...]) -> int:
        axes = zip(sizes, reach, tile, strict=True)
        return prod(min(-(-size // t), 1 + 2 * -(-far // t)) for size, far, t in axes)

    splits = itertools.product(range(TILE_BITS + 1), repeat=len(sizes))
    tiles = [tuple(1 << bits for bits in split) for split in splits if sum(split) == TILE_BITS]
    return min(tiles, key=lambda tile: (touched(tile), max(tile), tile))


class OnGrid(ABC):
    """A pattern whose rule speaks of one axis of a grid at a time."""

    @functools.cached_property
    @abstractmethod
    def _grid(self) -> Grid:
        """The grid that the pattern lies on."""

    @abstractmethod
    def span(self, axis: int, i: Tensor) -> tuple[Tensor, Tensor]:
        """First key and one past the last that coordinate `i` sees along an axis."""

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """True where the query at position `q` reads the key at position `k`."""
        return self._grid.allows(q, k, self.span)

    def key_ranges(self, first: int, last: int, n_keys: int) -> Iterable[tuple[int, int]]:
        """Runs of slots around what the slots from `first` to `last` read."""
        return self._grid.key_ranges(first, last, self.span)

    def order(self, n_tokens: int) -> Tensor:
        """Position of the token in each slot of the blocks, int64.

        Raises:
            UsageError: if the sequence is not the grid.
        """
        self._grid.require(n_tokens)
        return self._grid.order
