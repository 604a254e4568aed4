"""The greedy pass and the exchanges after it."""

from __future__ import annotations

import math
from collections.abc import Callable

from prunekit.core.errors import EvaluationError, PlanError
from prunekit.core.types import OrderStep
from prunekit.search._candidates import Units, candidates, front, ordered
from prunekit.search._evaluator import Evaluator
from prunekit.search._memory import Memory, Trust, levels
from prunekit.search._race import Runner, race


class Greedy:
    """Removes units one by one from the evaluator's model.

    Args:
        evaluator: at its dense model.
        kind: what goes in one step, as for `candidates`.
        per: what the added distance is divided by; None for none.
        protect_front: the paper's rate.
        trust: what candidates are skipped by; None runs them all at every step.
    """

    def __init__(
        self, evaluator: Evaluator, kind: str, per: str | None, protect_front: float, trust: Trust | None = None
    ) -> None:
        self.steps: list[OrderStep] = []
        self._evaluator = evaluator
        self._kind = kind
        self._per = per
        self._exact = trust is None
        self._front, self._released_after = front(evaluator.addresses, kind, protect_front)
        self._memory = Memory(trust or Trust())

    def step(self) -> None:
        """Removes the best candidate.

        Raises:
            PlanError: if there is none.
            EvaluationError: if no candidate has a distance.
        """
        evaluator = self._evaluator
        removed, base = evaluator.removed, evaluator.base
        runners = [self._memory.runner(units, removed, base) for units in self._candidates(removed)]
        best = self._best(runners, self._value)
        distance = evaluator.mean(best.found)
        if not math.isfinite(distance):
            raise EvaluationError(
                "no candidate has outputs that are numbers", hint="try `dtype: float32`, or remove less"
            )
        alive = [address for address in evaluator.addresses if address not in removed]
        self._memory.learn(runners, evaluator)
        self._memory.went(best.units, alive)
        self.steps.append(OrderStep(best.units, distance))
        evaluator.move(best.removed, best.found)

    def swap(self, most: int, enough: Callable[[frozenset[str]], bool]) -> int:
        """Exchanges removed units for kept ones while that lowers the distance, the best exchange first.

        Args:
            most: exchanges at most.
            enough: whether a set of removed sub-layers reaches the budget.
        Returns:
            Exchanges made; the steps are the new set in the old order, with distances measured again.
        """
        made = 0
        while made < most and self._swap_once(enough):
            made += 1
        if made:
            self._measure_again()
        return made

    def _candidates(self, removed: frozenset[str]) -> list[Units]:
        evaluator = self._evaluator
        kept = evaluator.protected
        withheld = self._front if len(removed) < self._released_after else frozenset()
        found = candidates(self._kind, evaluator.addresses, removed, kept | withheld)
        found = found or candidates(self._kind, evaluator.addresses, removed, kept)
        found = [units for units in found if self._saved(units) > 0]
        if not found:
            left = len(evaluator.addresses) - len(removed)
            why = f"{left} sub-layers are left, and none of them may go" + (f" and saves {self._per}" * bool(self._per))
            raise PlanError("the budget cannot be reached", why=why, hint="remove less, or protect less")
        return found

    def _saved(self, units: Units) -> float:
        return sum(self._evaluator.cost(address, self._per) for address in units) if self._per else 1.0

    def _value(self, runner: Runner, distance: float) -> float:
        return (distance - self._evaluator.mean(runner.base)) / self._saved(runner.units)

    def _best(self, runners: list[Runner], value: Callable[[Runner, float], float], limit: float = math.inf) -> Runner:
        if not self._exact:
            return race(self._evaluator, runners, value, limit)
        for runner, found in zip(runners, self._evaluator.whole([r.removed for r in runners]), strict=True):
            runner.found = list(found)
        return min(runners, key=lambda runner: value(runner, self._evaluator.mean(runner.found)))

    def _swap_once(self, enough: Callable[[frozenset[str]], bool]) -> bool:
        evaluator, memory = self._evaluator, self._memory
        now = evaluator.mean(evaluator.base)
        without = [evaluator.removed.difference(step.units) for step in self.steps]
        runners, gone = [], []
        for step, removed, base in zip(self.steps, without, evaluator.whole(without), strict=True):
            alive = [address for address in evaluator.addresses if address not in removed]
            changed = levels(step.units, alive)
            for units in self._candidates(removed):
                if units != step.units and enough(removed | set(units)) and self._exchanged(step.units, units):
                    runners.append(memory.runner(units, removed, base, changed))
                    gone.append(step.units)
        if not runners:
            return False
        best = self._best(runners, lambda _, distance: distance, now)
        if len(best.found) < len(evaluator.weights) or evaluator.mean(best.found) >= now:
            return False
        order = self._exchanged(gone[runners.index(best)], best.units)
        assert order is not None
        self.steps = [OrderStep(units, math.nan) for units in order]
        evaluator.move(best.removed, best.found)
        return True

    def _exchanged(self, gone: Units, units: Units) -> list[Units] | None:
        """The units removed after an exchange, in an order that can be followed."""
        changed = [units if step.units == gone else step.units for step in self.steps]
        if self._kind not in ("pairs", "mixed"):
            return changed
        return ordered(changed, self._kind, self._evaluator.addresses, self._evaluator.protected)

    def _measure_again(self) -> None:
        evaluator = self._evaluator
        evaluator.move(frozenset(), (0.0,) * len(evaluator.weights))
        for i, step in enumerate(self.steps):
            removed = evaluator.removed | set(step.units)
            found = evaluator.whole([removed])[0]
            evaluator.move(removed, found)
            self.steps[i] = OrderStep(step.units, evaluator.mean(found))
