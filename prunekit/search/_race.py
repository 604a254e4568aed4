"""Finds the best of many candidates while most of them are looked at on little data, or not at all."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from prunekit.search._candidates import Units
from prunekit.search._evaluator import Evaluator


@dataclass(frozen=True)
class Trust:
    """How much of what a candidate added to the distance earlier, or elsewhere, it adds at least now and here.

    Added distances change little while units far away go; what they fall by comes from neighbours, most of all from the
    other sub-layer of the same block. docs/concepts/finercut.md has the measurements behind these numbers.

    Args:
        beside: when the next or the previous surviving sub-layer went since.
        near: when one went that was two or three places away.
        far: when only others went.
        fade: times this for every step further back that it was measured.
        least: what fading stops at.
        look: on parts not yet run, after a look at others told how it changed there.
        first_look: on parts never run, from those that were.
    """

    beside: float = 0.1
    near: float = 0.4
    far: float = 0.7
    fade: float = 0.95
    least: float = 0.4
    look: float = 0.6
    first_look: float = 0.4

    def after(self, level: int, steps: int) -> float:
        """Share to count on.

        Args:
            level: 0 beside, 1 near, 2 far.
            steps: removals since it was measured, from 1 on.
        """
        fresh = (self.beside, self.near, self.far)[level]
        return max(min(fresh, self.least), fresh * self.fade ** (steps - 1))


@dataclass(eq=False)
class Runner:
    """A candidate in a race.

    Args:
        units: what it takes away.
        removed: all sub-layers missing in the model that it stands for.
        base: distance on every part of the model that it adds to.
        added: expected added distance on every part, evened; None where nothing is known.
        seen: how many parts, from the first on, that was measured on; on the others it is a guess.
        share: least share of the expectation that is counted on; 0 counts on nothing.
        found: distances measured, first part first.
    """

    units: Units
    removed: frozenset[str]
    base: tuple[float, ...]
    added: tuple[float, ...] | None = None
    seen: int = 0
    share: float = 0.0
    found: list[float] = field(default_factory=list)

    def expected(self, evaluator: Evaluator) -> list[float]:
        """Added distance, evened, on all parts: as measured, or as expected now; empty where nothing is known."""
        weights, even = evaluator.weights, evaluator.distance.evened
        now = [even(found) - even(base) for found, base in zip(self.found, self.base, strict=False)]
        if not now:
            return list(self.added or ())
        done = len(now)
        if self.added is not None:
            both = min(done, self.seen)
            before = _mean(weights, self.added[:both])
            # What rose on some parts may not have risen on others.
            change = min(max(_mean(weights, now[:both]) / before, 0.0), 1.0) if before > 0 else 1.0
            now += [change * value for value in self.added[done : self.seen]]
        return now + [_mean(weights, now)] * (len(weights) - len(now))

    def bound(self, evaluator: Evaluator, trust: Trust) -> float:
        """Distance on all data that the candidate will hardly stay below; exact once all parts are measured."""
        done = len(self.found)
        if done == len(evaluator.weights):
            return evaluator.mean(self.found)
        expected = self.expected(evaluator)
        known = trust.look if done else self.share
        if not expected or not known:
            return -math.inf
        guessed = trust.first_look if done else self.share * trust.first_look
        even, distance = evaluator.distance.evened, evaluator.distance.from_evened
        values = list(self.found)
        for part in range(done, len(expected)):
            share, added = known if part < self.seen else guessed, expected[part]
            values.append(distance(even(self.base[part]) + (added * share if added > 0 else added / share)))
        return evaluator.mean(values)


def _mean(weights: Sequence[float], values: Sequence[float]) -> float:
    used = weights[: len(values)]
    return sum(weight * value for weight, value in zip(used, values, strict=True)) / sum(used)


def race(
    evaluator: Evaluator,
    runners: Sequence[Runner],
    value: Callable[[Runner, float], float],
    trust: Trust,
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
    heap = [(value(runner, runner.bound(evaluator, trust)), i) for i, runner in enumerate(runners)]
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
            heapq.heappush(heap, (value(runners[i], runners[i].bound(evaluator, trust)), i))
        for entry in others:
            heapq.heappush(heap, entry)
