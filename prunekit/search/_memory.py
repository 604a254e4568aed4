"""What a search has seen of its candidates in earlier steps, and how far that can be relied on."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prunekit.search._candidates import Units
from prunekit.search._evaluator import Evaluator
from prunekit.search._race import Runner, weighted

# Survivors on each side of a unit that goes that count as beside it, and as near it, in widths of the unit.
_REACHES = (1, 3)
_FAR = len(_REACHES)
_FIRST_LOOK = _FAR + 1
# A search that sees more than this share of its expectations fail expects less.
_FAILING = 0.01


@dataclass(frozen=True)
class Trust:
    """Least share of what a candidate added to the distance earlier, or on other data, that it adds here and now.

    What was added changes little while units far away go. It falls with neighbours, and with the other sub-layer of the
    same block it may fall below nothing: candidates beside a unit that went are always run again.

    These shares are measured, not proven. On SmolLM2-135M (2 x 128 tokens, js, 18 sub-layers, 25 % of block parameters)
    the order is right too where only 0.7 of the losses are allowed for, and wrong from step 5 on at 0.6; on 8 x 32
    tokens the limits were 0.7 for single sub-layers, by distance and by parameters, 0.9 for pairs and 0.4 for blocks.

    Args:
        near: when a unit two or three places away went since.
        far: when only others went.
        fade: times this for every step further back.
        least: what fading stops at.
        first_look: where it was never run, of the mean over data where it was.
    """

    near: float = 0.4
    far: float = 0.65
    fade: float = 0.97
    least: float = 0.4
    first_look: float = 0.4


@dataclass
class _Seen:
    added: float
    step: int
    level: int = _FAR


class Memory:
    """Added distances of candidates, as of when they were last run, on every part of the data.

    Args:
        trust: what to begin with; shares fall where the search sees that they are too large.
    """

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._seen: dict[Units, list[_Seen]] = {}
        self._step = 0
        self._kept: dict[int, list[float]] = {}

    def runner(
        self, units: Units, removed: frozenset[str], base: tuple[float, ...], changed: dict[str, int] | None = None
    ) -> Runner:
        """The candidate with what is known of it.

        Args:
            removed: sub-layers that are missing before it goes.
            base: distance on every part without those.
            changed: `levels` around units that came back besides.
        """
        nearest = _level(units, changed or {})
        known = tuple(
            (seen.added, self._share(min(seen.level, nearest), self._steps(seen) + bool(changed)))
            for seen in self._seen.get(units, ())
        )
        return Runner(units, removed | set(units), base, known, self._share(_FIRST_LOOK, 1))

    def learn(self, runners: Iterable[Runner], evaluator: Evaluator) -> None:
        """Takes in what a race measured."""
        for runner in runners:
            seen, added = self._seen.get(runner.units, []), runner.added(evaluator)
            for part, now in enumerate(added):
                if part < len(seen):
                    before, level = (
                        seen[part].added * self._trust.fade ** (self._steps(seen[part]) - 1),
                        seen[part].level,
                    )
                else:
                    before, level = weighted(added[:part], evaluator.weights) if part else 0.0, _FIRST_LOOK
                if before > 0:
                    insort(self._kept.setdefault(level, []), now / before)
            if added:
                self._seen[runner.units] = [_Seen(now, self._step) for now in added] + seen[len(added) :]

    def went(self, units: Units, alive: Sequence[str]) -> None:
        """Ends a step.

        Args:
            units: what went.
            alive: surviving sub-layers before it went, in execution order.
        """
        self._step += 1
        changed = levels(units, alive)
        for known, parts in self._seen.items():
            for seen in parts:
                seen.level = min(seen.level, _level(known, changed))

    def _steps(self, seen: _Seen) -> int:
        return max(1, self._step - seen.step)

    def _share(self, level: int, steps: int) -> float:
        if level == 0:
            return 0.0
        trust = self._trust
        share = {1: trust.near, _FAR: trust.far, _FIRST_LOOK: trust.first_look}[level]
        kept = self._kept.get(level)
        if kept:
            share = min(share, kept[int(len(kept) * _FAILING)])
        return max(share * trust.fade ** (steps - 1), min(share, trust.least))


def levels(units: Units, alive: Sequence[str]) -> dict[str, int]:
    """Sub-layers beside (0) and near (1) some others, these included.

    Args:
        alive: sub-layers in execution order, the others included.
    """
    places = [alive.index(address) for address in units]
    found: dict[str, int] = {}
    for level, reach in reversed(list(enumerate(_REACHES))):
        around = alive[max(0, places[0] - reach * len(units)) : places[-1] + reach * len(units) + 1]
        found.update(dict.fromkeys(around, level))
    return found


def _level(units: Units, changed: dict[str, int]) -> int:
    return min(changed.get(address, _FAR) for address in units)
