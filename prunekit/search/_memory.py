"""What a search has seen of its candidates in earlier steps, and how far that can be relied on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prunekit.search._candidates import Units
from prunekit.search._evaluator import Evaluator
from prunekit.search._race import Runner

# Least share of what a candidate added when it was last looked at that it adds now.
_TRUST = 0.5
# The same when one of its neighbours among the surviving sub-layers, so many on each side, went since.
_TRUST_NEAR = 0.25
_REACH = 3


class Memory:
    """Added distances of candidates, as of when they were last looked at."""

    def __init__(self) -> None:
        self._added: dict[Units, tuple[float, ...]] = {}
        self._near: set[Units] = set()

    def runner(self, units: Units, removed: frozenset[str], base: tuple[float, ...]) -> Runner:
        """The candidate with what is known of it.

        Args:
            removed: sub-layers that are missing before it goes.
            base: distance on every part without those.
        """
        trust = _TRUST_NEAR if units in self._near else _TRUST
        return Runner(units, removed | set(units), base, self._added.get(units), trust)

    def learn(self, runners: Iterable[Runner], evaluator: Evaluator) -> None:
        """Takes in what a race measured."""
        for runner in runners:
            expected = runner.expected(evaluator)
            if runner.found and expected is not None:
                self._added[runner.units] = expected
                self._near.discard(runner.units)

    def went(self, units: Units, alive: Sequence[str]) -> None:
        """Marks the neighbours of what went.

        Args:
            alive: surviving sub-layers before it went, in execution order.
        """
        places = [alive.index(address) for address in units]
        around = set(alive[max(0, places[0] - _REACH) : places[-1] + _REACH + 1])
        self._near.update(known for known in self._added if around.intersection(known))
