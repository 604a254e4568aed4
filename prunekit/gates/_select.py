"""From what speaks against each unit to the units that go: a threshold, minima and multiples, and the budget met."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunekit.core.errors import PlanError
from prunekit.plan.budget import protected
from prunekit.structure.parts import HIDDEN

if TYPE_CHECKING:
    from prunekit.core.recipe_learn import LearnBudget
    from prunekit.gates._costs import Costs
    from prunekit.gates._places import Place

# As for any budget: short of half a per cent of it is enough.
_SLACK = 0.005
# Removing so much more than asked, as a fraction of the model, still leaves the method's own threshold alone.
_BAND = 0.01


@dataclass(frozen=True)
class Chosen:
    """Which units stay.

    Args:
        keep: bool [units of all places].
        threshold: units stay where their doubt is below it; 0 is the method's own rule.
        removed: cost removed.
    """

    keep: Tensor
    threshold: float
    removed: float


class Chooser:
    """Chooses so that a budget is met; `safe` are the units that it protects, bool [units of all places].

    Args:
        places: all units.
        costs: of the same places.
        budget: how much goes, and what stays.
        goal: cost to remove.
    """

    def __init__(self, places: Sequence[Place], costs: Costs, budget: LearnBudget, goal: float) -> None:
        self._places, self._costs, self._budget, self._goal = places, costs, budget, goal
        units = [unit for place in places for unit in place.units]
        safe = protected(budget.protect, units)
        self.safe = torch.tensor([unit in safe for unit in units])

    def choose(self, doubt: Tensor) -> Chosen:
        """What stays, by how much speaks against each unit: those above a threshold go.

        That is 0 where that removes what the budget asks for and hardly more; else the one nearest to 0 on the
        way that just meets the budget.

        Raises:
            PlanError: if the budget cannot be met, whatever goes.
            FloatingPointError: if what speaks against a unit is not a number.
        """
        if not doubt.isfinite().all():
            raise FloatingPointError("doubt about a unit")
        given = doubt.detach().cpu().double().masked_fill(self.safe, -math.inf)
        orders = [given[place.slice].argsort(stable=True) for place in self._places]
        values = [given[place.slice][order].tolist() for place, order in zip(self._places, orders, strict=True)]
        counts = self._counts(values, 0.0)
        removed, threshold = self._removed(counts), 0.0
        if not self._enough(removed) or removed > self._goal + _BAND * self._costs.before:
            threshold, counts, removed = self._moved(values)
        keep = torch.zeros(len(given), dtype=torch.bool)
        for place, order, count in zip(self._places, orders, counts, strict=True):
            keep[place.begin + order[:count]] = True
        return Chosen(keep, threshold, removed)

    def _moved(self, values: list[list[float]]) -> tuple[float, list[int], float]:
        """The highest threshold that meets the budget."""
        steps = sorted({value for part in values for value in part if value != -math.inf})
        # Removing grows as the threshold falls.
        low, high = 0, len(steps) - 1
        best: tuple[float, list[int], float] | None = None
        while low <= high:
            middle = (low + high) // 2
            counts = self._counts(values, steps[middle])
            removed = self._removed(counts)
            if self._enough(removed):
                best, low = (steps[middle], counts, removed), middle + 1
            else:
                high = middle - 1
        if best is None:
            most = self._removed(self._counts(values, steps[0])) if steps else 0.0
            raise PlanError(
                "the budget of `learn` cannot be met",
                why=f"{most:,.6g} of {self._goal:,.6g} {self._budget.of} can go",
                hint="remove less, name more kinds in `learn.remove`, protect less, or lower `min_keep`",
            )
        return best

    def _counts(self, values: list[list[float]], threshold: float) -> list[int]:
        """Units that stay in each place."""
        raw = [bisect_left(part, threshold) for part in values]
        if self._budget.within == "group":
            for kind in {place.kind for place in self._places if place.axis}:
                of_kind = [i for i, place in enumerate(self._places) if place.kind == kind]
                mean = sum(raw[i] for i in of_kind) / len(of_kind)
                for i in of_kind:
                    raw[i] = math.floor(mean)
        whole = [i for i, place in enumerate(self._places) if not place.axis]
        if len(whole) == self._costs.n_rows and not any(raw[i] for i in whole):
            # A model needs a sub-layer.
            raw[min(whole, key=lambda i: values[i][0])] = 1
        return [self._fitting(place, count, part) for place, count, part in zip(self._places, raw, values, strict=True)]

    def _fitting(self, place: Place, count: int, values: list[float]) -> int:
        if not place.axis:
            return count
        width, least = len(values), max(self._budget.min_keep, bisect_left(values, -1e300), 1)
        asked = self._budget.multiple_of if place.kind in ("neurons", HIDDEN) else 1
        multiple = math.lcm(asked, place.multiple)
        nearest = (2 * count + multiple) // (2 * multiple) * multiple
        return min(width, max(nearest, -(-least // multiple) * multiple))

    def _removed(self, counts: list[int]) -> float:
        wide = {"dtype": torch.float64}
        narrowed = torch.tensor([n for place, n in zip(self._places, counts, strict=True) if place.axis], **wide)
        whole = [n for place, n in zip(self._places, counts, strict=True) if not place.axis]
        return self._costs.before - float(self._costs.of_counts(narrowed, torch.tensor(whole, **wide)))

    def _enough(self, removed: float) -> bool:
        return removed >= self._goal * (1 - _SLACK)
