"""Finds the best of many candidates while most of them are looked at on little data, or not at all."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from prunekit.search._candidates import Units
from prunekit.search._evaluator import Evaluator

# Least share of the expected added distance on the other parts, once a candidate was looked at on some: where its added
# distance on these was known from an earlier step, and where nothing was.
_TRUST_LOOK = 0.5
_TRUST_FIRST_LOOK = 0.4


@dataclass(eq=False)
class Runner:
    """A candidate in a race.

    Args:
        units: what it takes away.
        removed: all sub-layers missing in the model that it stands for.
        base: distance on every part of the model that it adds to.
        added: expected added distance on every part, evened; None where nothing is known.
        trust: least share of the expectation that is counted on; 0 counts on nothing.
        found: distances measured, first part first.
    """

    units: Units
    removed: frozenset[str]
    base: tuple[float, ...]
    added: tuple[float, ...] | None = None
    trust: float = 0.0
    found: list[float] = field(default_factory=list)

    def measured(self, evaluator: Evaluator) -> tuple[float, ...]:
        """Added distance, evened, on the parts measured."""
        evened = evaluator.distance.evened
        return tuple(evened(found) - evened(base) for found, base in zip(self.found, self.base, strict=False))

    def expected(self, evaluator: Evaluator) -> tuple[float, ...] | None:
        """Added distance, evened, on all parts: measured, or expected, less what the measured parts lost."""
        measured, weights = self.measured(evaluator), evaluator.weights
        if not measured:
            return self.added
        done = len(measured)
        seen = sum(w * m for w, m in zip(weights, measured, strict=False))
        if self.added is None:
            return measured + (seen / sum(weights[:done]),) * (len(weights) - done)
        before = sum(w * m for w, m in zip(weights, self.added[:done], strict=False))
        change = min(max(seen / before, 0.0), 1.0) if before > 0 else 1.0
        return measured + tuple(change * value for value in self.added[done:])

    def bound(self, evaluator: Evaluator) -> float:
        """Distance on all data that the candidate will hardly stay below; exact once all parts are measured."""
        done = len(self.found)
        if done == len(evaluator.weights):
            return evaluator.mean(self.found)
        expected = self.expected(evaluator)
        looked = _TRUST_FIRST_LOOK if self.added is None else _TRUST_LOOK
        trust = looked if done else self.trust
        if expected is None or not trust:
            return -math.inf
        even, distance = evaluator.distance.evened, evaluator.distance.from_evened
        rest = [
            distance(even(base) + (added * trust if added > 0 else added / trust))
            for base, added in zip(self.base[done:], expected[done:], strict=True)
        ]
        return evaluator.mean([*self.found, *rest])


def race(
    evaluator: Evaluator,
    runners: Sequence[Runner],
    value: Callable[[Runner, float], float],
    limit: float = math.inf,
) -> Runner:
    """The candidate of the smallest value, the first of equals; only its distance is known for sure.

    Whoever may be the best goes on by one part of the data, until one has run over all of it and nobody's bound is
    below.

    Args:
        value: what is minimised, from a candidate and its distance on all data; rising with the distance.
        limit: no candidate is wanted that does not stay below; the one returned then may have parts left.
    """
    parts = len(evaluator.weights)
    heap = [(value(runner, runner.bound(evaluator)), i) for i, runner in enumerate(runners)]
    heapq.heapify(heap)
    while True:
        bound, first = heap[0]
        part = len(runners[first].found)
        if part == parts or bound >= limit:
            return runners[first]
        together, others = [], []
        while heap and len(together) < evaluator.width(part):
            entry = heapq.heappop(heap)
            done = len(runners[entry[1]].found)
            if done == parts:
                others.append(entry)
                break
            (together if done == part else others).append(entry)
        found = evaluator.measure([runners[i].removed for _, i in together], part)
        for (_, i), distance in zip(together, found, strict=True):
            runners[i].found.append(distance)
            heapq.heappush(heap, (value(runners[i], runners[i].bound(evaluator)), i))
        for entry in others:
            heapq.heappush(heap, entry)
