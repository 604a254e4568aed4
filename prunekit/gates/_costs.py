"""What is left of a model's cost, as a polynomial of the widths that are left, so that it has gradients."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunekit.plan.cost import sublayer_cost
from prunekit.structure.parts import HIDDEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prunekit.gates._places import Place
    from prunekit.structure.parts import SubLayer
    from prunekit.structure.view import ModelView

# The axes of each kind whose size may change; the third of every sub-layer is the hidden width.
_AXES = {"attention": ("kv", "rep"), "ffn": ("ffn",)}
_CORNERS = tuple(product((0, 1), repeat=3))


class Costs:
    """Cost of a model in which units are left in part.

    A sub-layer's cost is multilinear in its widths, so that its values at sizes 0 and 1 tell it everywhere.

    Args:
        view: the model.
        of: `params` or `flops`.
        places: the units.
    """

    def __init__(self, view: ModelView, of: str, places: Sequence[Place]) -> None:
        rows = {sublayer.address: row for row, sublayer in enumerate(view.sublayers)}
        self.n_rows, wide = len(rows), {"dtype": torch.float64}
        self._terms = torch.tensor([_terms(view, sublayer, of) for sublayer in view.sublayers], **wide)
        self._widths = torch.tensor([_sizes(view, sublayer) for sublayer in view.sublayers], **wide)
        self._whole = [(rows[place.address], place.begin) for place in places if not place.axis]
        narrow = [place for place in places if place.axis]
        # Rows and columns of the widths that each narrowed group sets.
        self._cells = [
            [(row, 2) for row in range(self.n_rows)]
            if place.kind == HIDDEN
            else [(rows[place.address], _AXES[view.sublayer(place.address).kind].index(place.axis))]
            for place in narrow
        ]
        self._units = torch.cat([torch.arange(place.begin, place.begin + len(place.units)) for place in narrow] or
                                [torch.zeros(0, dtype=torch.int64)])  # fmt: skip
        sizes = torch.tensor([len(place.units) for place in narrow], dtype=torch.int64)
        self._group = torch.arange(len(narrow)).repeat_interleave(sizes)
        self.before = float(self.left(torch.ones(sum(len(place.units) for place in places), **wide)))

    def left(self, kept: Tensor) -> Tensor:
        """Cost of what is left.

        Args:
            kept: how much of each unit is left, 0 to 1, float64 on the CPU.
        Returns:
            A scalar, float64.
        """
        counts = torch.zeros(len(self._cells), dtype=torch.float64).index_add(0, self._group, kept[self._units])
        return self.of_counts(counts, kept[[unit for _, unit in self._whole]])

    def of_counts(self, counts: Tensor, whole: Tensor) -> Tensor:
        """The same by numbers of units left in each narrowed group, and how much is left of each gated sub-layer."""
        widths, ones = self._widths, torch.ones(self.n_rows, dtype=torch.float64)
        if self._cells:
            row, column = torch.tensor([cell for cells in self._cells for cell in cells]).T
            group = torch.arange(len(counts)).repeat_interleave(torch.tensor([len(cells) for cells in self._cells]))
            widths = widths.index_put((row, column), counts[group])
        powers = [
            torch.stack([widths[:, i] if used else ones for i, used in enumerate(corner)]).prod(0)
            for corner in _CORNERS
        ]
        costs = (self._terms * torch.stack(powers, 1)).sum(1)
        if self._whole:
            costs = costs * ones.index_put((torch.tensor([row for row, _ in self._whole]),), whole)
        return costs.sum()


def _sizes(view: ModelView, sublayer: SubLayer) -> list[int]:
    sizes = [sublayer.widths[axis] for axis in _AXES[sublayer.kind]]
    return [*[*sizes, 1][:2], view.hidden]


def _terms(view: ModelView, sublayer: SubLayer, of: str) -> list[float]:
    """Coefficient of each product of widths, in the order of `_CORNERS`."""
    axes = (*(*_AXES[sublayer.kind], "none")[:2], HIDDEN)
    at = {corner: sublayer_cost(view, sublayer, of, dict(zip(axes, corner, strict=True))) for corner in _CORNERS}

    def coefficient(corner: tuple[int, ...]) -> float:
        below = [other for other in _CORNERS if all(o <= c for o, c in zip(other, corner, strict=True))]
        return sum(at[other] * (-1) ** (sum(corner) - sum(other)) for other in below)

    return [coefficient(corner) for corner in _CORNERS]
