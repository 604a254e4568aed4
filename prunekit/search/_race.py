"""Finds the best of many candidates while most of them are run on little data, or not at all."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from prunekit.search._candidates import Units
from prunekit.search._evaluator import Evaluator


@dataclass(eq=False)
class Runner:
    """A candidate in a race.

    Args:
        units: what it takes away.
        removed: all sub-layers missing in the model that it stands for.
        base: distance on every part of the model that it adds to.
        known: for the first parts, what it added to the distance earlier (evened) and the share of that to count on.
        guess: share of the mean over other parts to count on where it was never run.
        found: distances measured, first part first.
    """

    units: Units
    removed: frozenset[str]
    base: tuple[float, ...]
    known: tuple[tuple[float, float], ...] = ()
    guess: float = 0.0
    found: list[float] = field(default_factory=list)

    def added(self, evaluator: Evaluator) -> list[float]:
        """What it adds to the distance on the parts measured, evened."""
        even = evaluator.distance.evened
        return [even(found) - even(base) for found, base in zip(self.found, self.base, strict=False)]

    def bound(self, evaluator: Evaluator) -> float:
        """Distance on all data that it will hardly stay below; exact once all parts are measured."""
        done, weights = len(self.found), evaluator.weights
        if done == len(weights):
            return evaluator.mean(self.found)
        counted = [(added, 1.0) for added in self.added(evaluator)] + list(self.known[done:])
        # The loss of a text falls here and rises there; a look at one part tells nothing about the next.
        if not counted or (done and evaluator.distance.text):
            return -math.inf
        guess = (weighted([added for added, _ in counted], weights), self.guess * min(share for _, share in counted))
        counted += [guess] * (len(weights) - len(counted))
        if min(share for _, share in counted) <= 0:
            return -math.inf
        even, distance = evaluator.distance.evened, evaluator.distance.from_evened
        rest = [
            distance(even(base) + added - (1 - share) * abs(added))
            for base, (added, share) in zip(self.base[done:], counted[done:], strict=True)
        ]
        return evaluator.mean([*self.found, *rest])


def weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    """Mean by the first weights."""
    used = weights[: len(values)]
    return sum(weight * value for weight, value in zip(used, values, strict=True)) / sum(used)


def race(
    evaluator: Evaluator,
    runners: Sequence[Runner],
    value: Callable[[Runner, float], float],
    limit: float = math.inf,
) -> Runner:
    """The candidate of the smallest value, the first of equals.

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
        together: list[int] = []
        others: list[tuple[float, int]] = []
        while heap and len(together) < evaluator.width(part) and len(runners[heap[0][1]].found) < parts:
            entry = heapq.heappop(heap)
            if len(runners[entry[1]].found) == part:
                together.append(entry[1])
            else:
                others.append(entry)
        for i, distance in zip(together, evaluator.measure([runners[i].removed for i in together], part), strict=True):
            runners[i].found.append(distance)
            heapq.heappush(heap, (value(runners[i], runners[i].bound(evaluator)), i))
        for entry in others:
            heapq.heappush(heap, entry)
