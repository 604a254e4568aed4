"""What is left of a model's cost, as a polynomial of the widths that are left, so that it has gradients."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunekit.plan.cost import sublayer_cost

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prunekit.gates._places import Place
    from prunekit.structure.view import ModelView, SubLayer

# The two axes of each kind whose size may change.
_AXES = {"attention": ("kv", "rep"), "ffn": ("ffn",)}


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
        self.n_rows = len(rows)
        wide = {"dtype": torch.float64}
        self._terms = torch.tensor([_terms(view, sublayer, of) for sublayer in view.sublayers], **wide)
        self._widths = torch.tensor([_sizes(sublayer) for sublayer in view.sublayers], **wide)
        self._whole: list[tuple[int, int]] = []
        self._cells: list[tuple[int, int]] = []
        to_cell = torch.full((sum(len(place.units) for place in places),), -1)
        for place in places:
            row = rows[place.address]
            if place.axis:
                to_cell[place.slice] = len(self._cells)
                self._cells.append((row, _AXES[view.sublayer(place.address).kind].index(place.axis)))
            else:
                self._whole.append((row, place.begin))
        self._gated, self._to_cell = (to_cell >= 0).nonzero().flatten(), to_cell[to_cell >= 0]
        self.before = float(self.left(torch.ones(len(to_cell), **wide)))

    def left(self, kept: Tensor) -> Tensor:
        """Cost of what is left.

        Args:
            kept: how much of each unit is left, 0 to 1, float64 on the CPU.
        Returns:
            A scalar, float64.
        """
        counts = torch.zeros(len(self._cells), dtype=torch.float64).index_add(0, self._to_cell, kept[self._gated])
        return self.of_counts(counts, torch.stack([kept[unit] for _, unit in self._whole]) if self._whole else None)

    def of_counts(self, counts: Tensor, whole: Tensor | None) -> Tensor:
        """The same by numbers of units left in each narrowed group, and how much is left of each gated sub-layer."""
        widths = self._widths
        if self._cells:
            at = torch.tensor(self._cells).T
            widths = widths.index_put((at[0], at[1]), counts)
        ones = torch.ones(self.n_rows, dtype=torch.float64)
        powers = [ones, widths[:, 1], widths[:, 0], widths[:, 0] * widths[:, 1]]
        costs = (self._terms * torch.stack(powers, 1)).sum(1)
        if whole is not None:
            costs = costs * ones.index_put((torch.tensor([row for row, _ in self._whole]),), whole)
        return costs.sum()


def _sizes(sublayer: SubLayer) -> list[int]:
    sizes = [sublayer.widths[axis] for axis in _AXES[sublayer.kind]]
    return [*sizes, 1][:2]


def _terms(view: ModelView, sublayer: SubLayer, of: str) -> list[float]:
    """Coefficients of 1, b, a and ab, where a and b are the sub-layer's two widths."""
    axes = _AXES[sublayer.kind]
    found: Mapping[tuple[int, ...], float] = {
        corner: sublayer_cost(view, sublayer, of, dict(zip(axes, corner, strict=False)))
        for corner in product((0, 1), repeat=2)
    }
    one, b, a = found[0, 0], found[0, 1] - found[0, 0], found[1, 0] - found[0, 0]
    return [one, b, a, found[1, 1] - one - a - b]
