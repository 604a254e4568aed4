"""Blocks of a line, an image or a video that read themselves and a rim around them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from prunekit.runtime.attention.patterns._checks import at_least
from prunekit.runtime.attention.patterns._grid import Grid, OnGrid, best_tile, n_axes, per_axis


@dataclass(frozen=True)
class Halo(OnGrid):
    """The grid is cut into blocks; every query of a block reads the block and `halo` tokens around it.

    Args:
        grid: tokens along each of one to three axes, the last running fastest.
        block: tokens of a block along each axis, 1 or more; one number for all axes, or one for each, as `halo`.
        halo: tokens around it, 0 or more.
        prefix_tokens: tokens before the grid, such as a class token, that read and are read by all.
        tile: tokens along each axis that share a kernel's block; None for those 128 that touch fewest blocks.
    """

    grid: tuple[int, ...] = (16, 16)
    block: tuple[int, ...] | int = 8
    halo: tuple[int, ...] | int = 3
    prefix_tokens: int = 0
    tile: tuple[int, ...] | None = None

    causal: ClassVar[bool] = False
    paper: ClassVar[tuple[str, str]] = (
        "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", "https://arxiv.org/abs/2103.12731",
    )  # fmt: skip
    evidence: ClassVar[str] = "text: block and halo of the paper's section 2.2"
    deviations: ClassVar[str] = "keys outside the image are not there; the paper pads with zeros, which take part"
    status: ClassVar[Literal["preview", "stable"]] = "preview"
    example: ClassVar[dict[str, Any]] = {"grid": [6, 9], "block": [2, 4], "halo": 1}

    def __post_init__(self) -> None:
        at_least(self, prefix_tokens=0)
        axes = n_axes(self.grid)
        for option, least in (("grid", 1), ("block", 1), ("halo", 0)):
            object.__setattr__(self, option, per_axis(option, getattr(self, option), axes, least))
        reach = [b // 2 + h for b, h in zip(self.block, self.halo, strict=True)]  # type: ignore[arg-type]
        tile = best_tile(self.grid, reach) if self.tile is None else self.tile
        object.__setattr__(self, "tile", per_axis("tile", tile, axes, 1))

    @functools.cached_property
    def _grid(self) -> Grid:
        return Grid(self.grid, self.prefix_tokens, (1,) * len(self.grid), self.tile or ())

    def span(self, axis: int, i: Tensor) -> tuple[Tensor, Tensor]:
        """First key and one past the last that the block of coordinate `i` reads along an axis."""
        block, halo = self.block[axis], self.halo[axis]  # type: ignore[index]
        first = i // block * block - halo
        return first, first + block + 2 * halo
