"""How much must go, in the budget's own measure, and when enough has gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING

from prunekit.core.errors import PlanError
from prunekit.core.rounding import n_remove
from prunekit.plan.cost import unit_cost
from prunekit.structure.architecture import SUBLAYER_KINDS

if TYPE_CHECKING:
    from prunekit.core.recipe_model import Budget
    from prunekit.plan.costs import CostTable
    from prunekit.structure.parts import Group
    from prunekit.structure.view import ModelView

# Six FFNs of SmolLM2 are 14.998 % of its block parameters: nobody who asks for 15 % wants a seventh to go.
_SLACK = 0.005
_NOISE = 1e-9
UnitCost = Callable[[str, str], float]


@dataclass(frozen=True)
class Scored:
    """A group with a score a unit, higher = keep."""

    group: Group
    values: Sequence[float]


class Target:
    """What a budget asks to remove from a model.

    Fractions are of what the source model has, in its blocks: `remove: 0.2, of: params` counts embeddings neither as
    removed nor as there. Several steps of one recipe add up, each with its own share of the source.

    Args:
        source: the model before any cut.
        view: the model as earlier steps left it.
        budget: how much.
        kind: kind of unit.
        units: how many units of the kind there are in `view`.
        costs: cost of an address in a measure; the default knows shapes, a search also knows latency.
        table: what a budget with `latency_ms` is reckoned by; it is met in full.
    Raises:
        PlanError: if the budget is of nothing, leaves nothing, or is met as it is.
    """

    def __init__(
        self,
        source: ModelView,
        view: ModelView,
        budget: Budget,
        kind: str,
        units: int,
        costs: UnitCost | None = None,
        table: CostTable | None = None,
    ) -> None:
        self.of: str = budget.of
        self.kind = kind
        self._slack = _SLACK
        self._costs = costs or (lambda address, of: unit_cost(view, address, of))
        if budget.latency_ms is not None and table is not None:
            self.of, self._slack = "latency_ms", 0.0
            self._costs = lambda address, _: table.unit_ms(view, address)
            self.amount = table.predict(view) - budget.latency_ms
            if self.amount <= 0:
                why = f"the model takes {table.predict(view):,.4g} ms, by the cost table"
                raise PlanError(f"`latency_ms: {budget.latency_ms:g}` is met as it is", why=why, hint="ask for less")
        elif budget.units is not None:
            if budget.units >= units:
                why = f"there are {units} {kind}"
                raise PlanError(f"`units: {budget.units}` leaves nothing", why=why, hint="remove fewer")
            self.amount = float(budget.units)
        elif budget.of == "units":
            self.amount = float(n_remove(units, budget.remove or 0.0))
        else:
            # Times are measured on what there is now.
            measured = view if budget.of == "latency_ms" else source
            count = self._costs if budget.of == "latency_ms" else partial(unit_cost, source)
            whole = sum(count(sublayer.address, budget.of) for sublayer in measured.sublayers)
            if whole == 0:
                raise PlanError(f"`of: {budget.of}` is nothing here", why=f"the model has no {budget.of}")
            self.amount = (budget.remove or 0.0) * whole

    def cost(self, address: str) -> float:
        """Cost of a unit, in the budget's measure."""
        return self._costs(address, self.of)

    def reached(self, removed: float) -> bool:
        """Whether that much removed is enough: all that was asked for, short of half a per cent of it."""
        return removed >= self.amount * (1 - self._slack) - _NOISE


def best_units(part: Scored, keep: int, safe: frozenset[str]) -> list[int]:
    """Positions of the protected units and of those with the highest scores, ascending.

    Raises:
        PlanError: if more are protected than may stay.
    """
    units, values = part.group.units, part.values
    fixed = sum(unit in safe for unit in units)
    if fixed > keep:
        raise PlanError(f"`protect` keeps {fixed} units of `{part.group.address}`", why=f"only {keep} may stay")
    order = sorted(range(len(units)), key=lambda i: (units[i] not in safe, -values[i], -i))
    return sorted(order[:keep])


def protected(patterns: Iterable[str], units: Iterable[str]) -> frozenset[str]:
    """Units that patterns such as `blocks.0.*` protect; `blocks.0.*` and `blocks.0` protect block 0 as a whole too.

    Raises:
        PlanError: for a pattern that matches no unit.
    """
    found: set[str] = set()
    units = tuple(units)
    for pattern in patterns:
        hits = [unit for unit in units if _matches(pattern, unit)]
        if not hits:
            hint = f"addresses read like `{units[0]}`" if units else ""
            raise PlanError(f"`protect: {pattern}` matches nothing", hint=hint)
        found.update(hits)
    return frozenset(found)


def _matches(pattern: str, unit: str) -> bool:
    """Whether a pattern names the unit, something it belongs to, or everything or something inside it."""
    parts = unit.split(".")
    if any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(2, len(parts) + 1)):
        return True
    inside = tuple(f"{unit}.{kind}" for kind in SUBLAYER_KINDS) if parts[-2:-1] == ["blocks"] else ()
    return any(fnmatchcase(address, pattern) for address in inside)
