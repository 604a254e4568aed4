"""What goes so that one pass takes no longer than it may, by a measured cost table, at the least score lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prunekit.core.errors import PlanError
from prunekit.core.types import OrderStep
from prunekit.plan.budget import Target, best_units, protected
from prunekit.plan.knapsack import least_loss
from prunekit.plan.plan import Plan
from prunekit.structure.parts import WIDTHS

if TYPE_CHECKING:
    from prunekit.core.recipe_model import Budget
    from prunekit.plan.budget import Scored
    from prunekit.plan.costs import CostTable
    from prunekit.structure.view import ModelView

# Widths that are weighed in each group: more would take time without a use.
_MOST_WIDTHS = 64


def fit(view: ModelView, kind: str, scored: Sequence[Scored], budget: Budget, table: CostTable) -> Plan:
    """Cuts after which the predicted latency is within the budget, with the least sum of scores removed.

    Whole units are a knapsack; widths one in which each group takes one of its widths, or the largest share that fits
    where all groups stay alike.

    Args:
        view: the model as earlier steps left it.
        kind: kind of unit.
        scored: its groups with their scores.
        budget: with `latency_ms`.
        table: milliseconds.
    Raises:
        PlanError: if the target cannot be reached, or is met as it is.
    """
    units = [unit for part in scored for unit in part.group.units]
    safe = protected(budget.protect, units)
    target = Target(view, view, budget, kind, len(units), table=table)
    if kind not in WIDTHS:
        return Plan.make(view, drop=_whole(view, scored[0], budget, safe, target))
    choose = _alike if budget.within == "group" else _each
    return Plan.make(view, keep=choose(view, scored, budget, safe, table))


def spare(steps: Sequence[OrderStep], target: Target) -> list[OrderStep]:
    """Steps of a removal order without those that the budget does not need, at the least distance added.

    A step's loss is what it added to the distance. A search stops at the step that reaches the budget; that one may
    save so much more than was missing that an earlier one need not have gone.

    Args:
        steps: of a search, first removal first, together enough.
        target: what must go.
    """
    before, options = 0.0, []
    for step in steps:
        cost = sum(target.cost(unit) for unit in step.units)
        options.append([(cost, 0.0), (0.0, max(0.0, step.distance - before))])
        before = step.distance
    room = sum(cost for (cost, _), _ in options) - target.amount
    taken = least_loss(options, max(0.0, room))
    return [step for step, option in zip(steps, taken, strict=True) if option == 1]


def _whole(view: ModelView, scored: Scored, budget: Budget, safe: frozenset[str], target: Target) -> list[str]:
    """Sub-layers of the units that go."""
    units, values = scored.group.units, scored.values
    # Removing a unit must lose something, or all of those below nothing would go for nothing.
    least = min(0.0, *values)
    costs = [target.cost(unit) for unit in units]
    items = [
        [(cost, 0.0)] if unit in safe else [(cost, 0.0), (0.0, value - least)]
        for unit, cost, value in zip(units, costs, values, strict=True)
    ]
    taken = _least(items, sum(costs) - target.amount, budget, target.kind)
    gone = [unit for unit, option in zip(units, taken, strict=True) if option == 1]
    if len(units) - len(gone) < budget.min_keep:
        why = f"{len(gone)} of {len(units)} would go, {budget.min_keep} must stay"
        raise _unreached(budget, target.kind, why)
    left = [sublayer.address for sublayer in view.sublayers]
    return [address for unit in gone for address in left if unit in (address, address.rpartition(".")[0])]


def _each(
    view: ModelView, scored: Sequence[Scored], budget: Budget, safe: frozenset[str], table: CostTable
) -> dict[str, list[int]]:
    """Positions kept by group, each with the width that the knapsack gives it."""
    items, widths = [], []
    least = min(0.0, *(value for part in scored for value in part.values))
    for part in scored:
        cost = _cost(view, part, table)
        fixed = sum(unit in safe for unit in part.group.units)
        free = sorted(v - least for unit, v in zip(part.group.units, part.values, strict=True) if unit not in safe)
        here = _widths(len(part.group.units), budget, fixed)
        widths.append(here)
        items.append([(cost(keep), sum(free[: len(part.group.units) - keep])) for keep in here])
    rest = table.predict(view) - sum(options[0][0] for options in items)
    taken = _least(items, (budget.latency_ms or 0.0) - rest, budget, "widths")
    return {
        part.group.address: best_units(part, here[option], safe)
        for part, here, option in zip(scored, widths, taken, strict=True)
    }


def _alike(
    view: ModelView, scored: Sequence[Scored], budget: Budget, safe: frozenset[str], table: CostTable
) -> dict[str, list[int]]:
    """Positions kept by group when each keeps the same share: the largest that fits."""
    there = [len(part.group.units) for part in scored]
    costs = [_cost(view, part, table) for part in scored]
    rest = table.predict(view) - sum(cost(width) for cost, width in zip(costs, there, strict=True))
    fixed = [sum(unit in safe for unit in part.group.units) for part in scored]
    choices = [_widths(width, budget, held, every=True) for width, held in zip(there, fixed, strict=True)]
    for share in sorted({keep / there[0] for keep in choices[0]}, reverse=True):
        keep = [
            max((k for k in here if k <= share * width + 1e-9), default=here[-1])
            for here, width in zip(choices, there, strict=True)
        ]
        if rest + sum(cost(k) for cost, k in zip(costs, keep, strict=True)) <= (budget.latency_ms or 0.0):
            return {part.group.address: best_units(part, k, safe) for part, k in zip(scored, keep, strict=True)}
    least = rest + sum(cost(here[-1]) for cost, here in zip(costs, choices, strict=True))
    raise _unreached(budget, "widths", f"the narrowest that may stay takes {least:,.4g} ms")


def _cost(view: ModelView, part: Scored, table: CostTable) -> Callable[[int], float]:
    """Milliseconds of a group's sub-layer by the units that stay."""
    address, _, kind = part.group.address.rpartition(".")
    sublayer = view.sublayer(address)
    return lambda keep: table.sublayer_ms(sublayer, {**sublayer.widths, WIDTHS[kind][1]: keep})


def _widths(width: int, budget: Budget, fixed: int, every: bool = False) -> list[int]:
    """Widths that may stay, widest first: all, and multiples down to what must stay."""
    step, floor = budget.multiple_of, max(1, budget.min_keep, fixed)
    found = [keep for keep in range((width - 1) // step * step, floor - 1, -step) if keep > 0]
    if not every and len(found) > _MOST_WIDTHS:
        found = [found[round(i * (len(found) - 1) / (_MOST_WIDTHS - 1))] for i in range(_MOST_WIDTHS)]
    return [width, *found]


def _least(items: Sequence[Sequence[tuple[float, float]]], limit: float, budget: Budget, kind: str) -> list[int]:
    try:
        return least_loss(items, limit)
    except PlanError as error:
        raise _unreached(budget, kind, error.why) from error


def _unreached(budget: Budget, kind: str, why: str) -> PlanError:
    what = f"`latency_ms: {budget.latency_ms:g}` cannot be reached by removing {kind}"
    return PlanError(what, why=why, hint="allow more time, protect less, or remove another kind")
