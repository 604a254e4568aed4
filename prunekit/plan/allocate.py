"""From scores to the units that go: whole units by one ranking, widths inside each group or over all groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunekit.core.errors import PlanError
from prunekit.core.rounding import n_keep, rounded_keep
from prunekit.plan.budget import Scored, Target, best_units, protected
from prunekit.plan.fit_latency import fit
from prunekit.plan.plan import Plan
from prunekit.search._candidates import candidates
from prunekit.structure.parts import HIDDEN, WIDTHS

if TYPE_CHECKING:
    from prunekit.core.recipe_model import Budget
    from prunekit.plan.costs import CostTable
    from prunekit.structure.view import ModelView


def allocate(
    source: ModelView,
    view: ModelView,
    kind: str,
    scored: Sequence[Scored],
    budget: Budget,
    table: CostTable | None = None,
) -> Plan:
    """Cuts that remove the units with the lowest scores; equal scores go in the order of depth.

    Args:
        source: the model before any cut, of which the budget's fraction is.
        view: the model as earlier steps left it.
        kind: kind of unit.
        scored: the groups of that kind in `view`.
        budget: how much goes and what stays.
        table: measured milliseconds, for a budget with `latency_ms`.
    Returns:
        Cuts of `view`.
    Raises:
        PlanError: if the budget cannot be reached.
    """
    units = [unit for part in scored for unit in part.group.units]
    if not units:
        raise PlanError(f"there are no {kind} to remove")
    if table is not None and budget.latency_ms is not None and not budget.keep_alternating:
        return fit(view, kind, scored, budget, table)
    safe = protected(budget.protect, units)
    if kind in WIDTHS or kind == HIDDEN:
        if budget.within == "group":
            keep = _alike(source, view, kind, scored, budget, safe)
        else:
            keep = _ranked(source, view, kind, scored, budget, safe)
        return Plan.make(view, keep=keep)
    if budget.keep_alternating:
        return Plan.make(view, drop=_pairs(source, view, kind, scored[0], budget, safe, table))
    return Plan.make(view, drop=_whole(source, view, kind, scored[0], budget, safe))


def _whole(
    source: ModelView, view: ModelView, kind: str, scored: Scored, budget: Budget, safe: frozenset[str]
) -> list[str]:
    """Sub-layers of the units that go."""
    units = scored.group.units
    target = Target(source, view, budget, kind, len(units))
    order = sorted(range(len(units)), key=lambda i: (scored.values[i], i))
    gone: list[str] = []
    removed = 0.0
    for i in order:
        if target.reached(removed):
            break
        if units[i] in safe or len(units) - len(gone) <= budget.min_keep:
            continue
        gone.append(units[i])
        removed += target.cost(units[i])
    _require(target, removed, kind, budget)
    left = [sublayer.address for sublayer in view.sublayers]
    return [address for unit in gone for address in left if address == unit or address.rpartition(".")[0] == unit]


def _pairs(
    source: ModelView,
    view: ModelView,
    kind: str,
    scored: Scored,
    budget: Budget,
    safe: frozenset[str],
    table: CostTable | None,
) -> list[str]:
    """Sub-layers that go in pairs of neighbours, the lowest sum of scores first; those left go on taking turns."""
    units, worth = scored.group.units, dict(zip(scored.group.units, scored.values, strict=True))
    target = Target(source, view, budget, kind, len(units), table=table)
    gone: frozenset[str] = frozenset()
    removed = 0.0
    while not target.reached(removed) and len(units) - len(gone) - 2 >= budget.min_keep:
        pairs = candidates("pairs", units, gone, safe)
        if not pairs:
            break
        best = min(pairs, key=lambda pair: sum(worth[unit] for unit in pair))
        gone |= set(best)
        removed += sum(target.cost(unit) for unit in best)
    _require(target, removed, kind, budget)
    return [unit for unit in units if unit in gone]


def _require(target: Target, removed: float, kind: str, budget: Budget) -> None:
    if not target.reached(removed):
        raise PlanError(
            f"the budget cannot be reached by removing {kind}",
            why=f"{removed:,.6g} of {target.amount:,.6g} {target.of} can go",
            hint="remove less, protect less or lower `min_keep`",
        )


def _alike(
    source: ModelView, view: ModelView, kind: str, scored: Sequence[Scored], budget: Budget, safe: frozenset[str]
) -> dict[str, list[int]]:
    """Positions kept by group when each group loses the same share."""
    share = _share(source, view, kind, scored, budget)
    found = {}
    for part in scored:
        width = len(part.group.units)
        if budget.units is not None:
            keep = rounded_keep(width, width - budget.units, budget.multiple_of, budget.min_keep)
        else:
            keep = n_keep(width, share, budget.multiple_of, budget.min_keep)
        found[part.group.address] = best_units(part, keep, safe)
    return found


def _share(source: ModelView, view: ModelView, kind: str, scored: Sequence[Scored], budget: Budget) -> float:
    """Fraction of the units of every group that must go."""
    if budget.units is not None or budget.of == "units":
        return budget.remove or 0.0
    n_units = sum(len(part.group.units) for part in scored)
    target = Target(source, view, budget, kind, n_units)
    there = sum(target.cost(part.group.units[0]) * len(part.group.units) for part in scored)
    if there <= target.amount:
        why = f"all of them make {there:,.6g} of {target.amount:,.6g} {budget.of}"
        raise PlanError(f"the budget cannot be reached by removing {kind}", why=why, hint="remove less")
    return target.amount / there


def _ranked(
    source: ModelView, view: ModelView, kind: str, scored: Sequence[Scored], budget: Budget, safe: frozenset[str]
) -> dict[str, list[int]]:
    """Positions kept by group when all units of the model compete; the groups may end up unequal."""
    n_units = sum(len(part.group.units) for part in scored)
    target = Target(source, view, budget, kind, n_units)
    costs = [target.cost(part.group.units[0]) for part in scored]
    order = sorted(
        (value, g, i) for g, part in enumerate(scored) for i, value in enumerate(part.values)
        if part.group.units[i] not in safe
    )  # fmt: skip
    gone = [0] * len(scored)
    removed = 0.0
    for _, g, _ in order:
        if target.reached(removed):
            break
        if len(scored[g].group.units) - gone[g] > budget.min_keep:
            gone[g] += 1
            removed += costs[g]
    _require(target, removed, kind, budget)
    found = {}
    for part, n in zip(scored, gone, strict=True):
        width = len(part.group.units)
        keep = rounded_keep(width, width - n, budget.multiple_of, budget.min_keep)
        found[part.group.address] = best_units(part, keep, safe)
    return found
