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
        if len(runners[first].found) == parts or bound >= limit:
            return runners[first]
        together, part = _next(heap, runners, evaluator)
        sets = [runners[i].removed for i in together]
        likely = [(sets, at) for at in _certain(evaluator, part)[1:]] if evaluator.ahead else []
        likely += _likely(heap, runners, evaluator, limit) if evaluator.ahead else []
        for i, distance in zip(together, evaluator.measure(sets, part, likely), strict=True):
            runners[i].found.append(distance)
            heapq.heappush(heap, (value(runners[i], runners[i].bound(evaluator)), i))


def _next(heap: list[tuple[float, int]], runners: Sequence[Runner], evaluator: Evaluator) -> tuple[list[int], int]:
    """Takes those off the heap that run next, and says on which part of the data."""
    parts, part = len(evaluator.weights), len(runners[heap[0][1]].found)
    together: list[int] = []
    others: list[tuple[float, int]] = []
    while heap and len(together) < evaluator.width(part) and len(runners[heap[0][1]].found) < parts:
        entry = heapq.heappop(heap)
        if len(runners[entry[1]].found) == part:
            together.append(entry[1])
        else:
            others.append(entry)
    for entry in others:
        heapq.heappush(heap, entry)
    return together, part


def _likely(
    heap: Sequence[tuple[float, int]], runners: Sequence[Runner], evaluator: Evaluator, limit: float
) -> list[tuple[list[frozenset[str]], int]]:
    """What will be run next if nothing changes the order: all that must be, or as much as other ranks can take."""
    rest = list(heap)
    found: list[tuple[list[frozenset[str]], int]] = []
    while rest and rest[0][0] < limit and (len(found) < evaluator.ahead or rest[0][0] == -math.inf):
        if len(runners[rest[0][1]].found) == len(evaluator.weights):
            break
        together, part = _next(rest, runners, evaluator)
        found += [([runners[i].removed for i in together], at) for at in _certain(evaluator, part)]
    return found


def _certain(evaluator: Evaluator, part: int) -> list[int]:
    """Parts that a candidate runs over once it runs over this one."""
    return list(range(part, len(evaluator.weights))) if evaluator.distance.text else [part]
