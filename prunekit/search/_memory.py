"""What a search has seen of its candidates in earlier steps, and how far that can be relied on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prunekit.search._candidates import Units
from prunekit.search._evaluator import Evaluator
from prunekit.search._race import Runner, Trust

# Surviving sub-layers on each side of one that goes that count as beside it, and as near it.
_REACHES = (1, 3)


@dataclass
class _Seen:
    added: tuple[float, ...]
    parts: int
    step: int
    level: int = len(_REACHES)


class Memory:
    """Added distances of candidates, as of when they were last looked at."""

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._seen: dict[Units, _Seen] = {}
        self._step = 0

    def runner(
        self, units: Units, removed: frozenset[str], base: tuple[float, ...], changed: dict[str, int] | None = None
    ) -> Runner:
        """The candidate with what is known of it.

        Args:
            removed: sub-layers that are missing before it goes.
            base: distance on every part without those.
            changed: levels of `levels` around what came back besides.
        """
        runner, seen = Runner(units, removed | set(units), base), self._seen.get(units)
        if seen is not None:
            level = min(seen.level, _level(units, changed or {}))
            steps = self._step - seen.step + bool(changed)
            runner.added, runner.seen, runner.share = seen.added, seen.parts, self._trust.after(level, steps)
        return runner

    def learn(self, runners: Iterable[Runner], evaluator: Evaluator) -> None:
        """Takes in what a race measured."""
        for runner in runners:
            if runner.found:
                parts = max(len(runner.found), runner.seen)
                self._seen[runner.units] = _Seen(tuple(runner.expected(evaluator)), parts, self._step)

    def went(self, units: Units, alive: Sequence[str]) -> None:
        """Ends a step.

        Args:
            units: what went.
            alive: surviving sub-layers before it went, in execution order.
        """
        self._step += 1
        changed = levels(units, alive)
        for known, seen in self._seen.items():
            seen.level = min(seen.level, _level(known, changed))


def levels(units: Units, alive: Sequence[str]) -> dict[str, int]:
    """Sub-layers beside (0) and near (1) some others, these included.

    Args:
        alive: sub-layers in execution order, the others included.
    """
    places = [alive.index(address) for address in units]
    found: dict[str, int] = {}
    for level, reach in reversed(list(enumerate(_REACHES))):
        around = alive[max(0, places[0] - reach) : places[-1] + reach + 1]
        found.update(dict.fromkeys(around, level))
    return found


def _level(units: Units, changed: dict[str, int]) -> int:
    return min(changed.get(address, len(_REACHES)) for address in units)
