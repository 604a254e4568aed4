"""The nearest keys along each axis of a line, an image or a video."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from prunekit.core.errors import UsageError
from prunekit.runtime.attention.patterns._checks import at_least
from prunekit.runtime.attention.patterns._grid import Grid, OnGrid, best_tile, n_axes, per_axis


@dataclass(frozen=True)
class Neighborhood(OnGrid):
    """Every query reads a window of exactly `window` keys along each axis, centred on it except near a border.

    At a border the window moves inward instead of shrinking. With a dilation of d, the tokens whose coordinate leaves
    the same remainder after division by d form a line of their own. With a stride of s, s neighbours share the window
    of their middle one (of their last one on a causal axis). On a causal axis a query reads the last `window` keys up
    to its own, fewer at the start.

    Args:
        grid: tokens along each of one to three axes, the last running fastest.
        window: keys along each axis, 1 or more; one number for all axes, or one for each, as the next three.
        dilation: distance of neighbours, 1 or more; dilation times window is at most the grid's size.
        stride: neighbours that share a window, at most `window`.
        causal_axes: 1 for an axis along which later keys are hidden, else 0.
        prefix_tokens: tokens before the grid, such as a class token, that read and are read by all.
        tile: tokens along each axis that share a block; None for those 128 whose windows touch fewest blocks.
    """

    grid: tuple[int, ...] = (16, 16)
    window: tuple[int, ...] | int = 7
    dilation: tuple[int, ...] | int = 1
    stride: tuple[int, ...] | int = 1
    causal_axes: tuple[int, ...] | int = 0
    prefix_tokens: int = 0
    tile: tuple[int, ...] | None = None

    paper: ClassVar[tuple[str, str]] = ("Neighborhood Attention Transformer", "https://arxiv.org/abs/2204.07143")
    evidence: ClassVar[str] = "code: the definition of window, dilation, stride and causality in NATTEN 0.21"
    deviations: ClassVar[str] = ""
    status: ClassVar[Literal["preview", "stable"]] = "preview"
    example: ClassVar[dict[str, Any]] = {"grid": [6, 9], "window": [3, 4], "dilation": [2, 1]}

    def __post_init__(self) -> None:
        at_least(self, prefix_tokens=0)
        axes = n_axes(self.grid)
        for option, least in (("grid", 1), ("window", 1), ("dilation", 1), ("stride", 1), ("causal_axes", 0)):
            object.__setattr__(self, option, per_axis(option, getattr(self, option), axes, least))
        sizes = [-(-size // d) for size, d in zip(self.grid, self._axes[2], strict=True)]
        tile = best_tile(sizes, [w // 2 for w in self._axes[1]]) if self.tile is None else self.tile
        object.__setattr__(self, "tile", per_axis("tile", tile, axes, 1))
        for size, window, dilation, stride, causal in zip(*self._axes, strict=True):
            if window * dilation > size or stride > window or causal > 1:
                raise UsageError(
                    f"a window of {window} with dilation {dilation} and stride {stride} does not fit an axis of {size}",
                    why="window times dilation is at most the axis, stride at most the window, `causal_axes` 0 or 1",
                )

    @property
    def _axes(self) -> tuple[tuple[int, ...], ...]:
        return self.grid, self.window, self.dilation, self.stride, self.causal_axes  # type: ignore[return-value]

    @property
    def causal(self) -> bool:
        """Whether keys after the query are hidden: along every axis, and there is no prefix that reads on."""
        return all(self._axes[4]) and self.prefix_tokens == 0

    @functools.cached_property
    def _grid(self) -> Grid:
        return Grid(self.grid, self.prefix_tokens, self._axes[2], self.tile or ())

    def span(self, axis: int, i: Tensor) -> tuple[Tensor, Tensor]:
        """First key and one past the last of the window of coordinate `i`, among the keys of its dilation group."""
        size, window, d, stride, causal = (option[axis] for option in self._axes)
        group, at = i % d, i // d
        last = (size - group + d - 1) // d - 1
        if causal:
            leader = (at // stride * stride + stride - 1).minimum(last)
            first, end = (leader - window + 1).clamp(min=0), at + 1
        else:
            leader = (at // stride * stride + stride // 2).minimum(last)
            right = window // 2 + window % 2 - 1
            first = (leader - window // 2).clamp(min=0) - (leader + right - last).clamp(min=0)
            end = first + window
        return first * d + group, (end - 1) * d + group + 1
