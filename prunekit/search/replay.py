"""Replays a removal order that was written down: one search serves every fraction."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.core.errors import PlanError, UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.types import Order, OrderStep


class SubLayers(Protocol):
    """What a replay has to know of a model; an evaluator knows it."""

    addresses: tuple[str, ...]
    protected: frozenset[str]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Replay:
    """Removes units in the order of a file that `prunekit score --output` wrote, without running the model.

    The order of a search without swaps does not depend on the budget, so the first steps of a long one are what a
    smaller budget would have found.

    Args:
        file: path of the JSON file.
    """

    file: str

    kinds: ClassVar[tuple[str, ...]] = ("sublayers", "attention", "ffn", "blocks")
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    evidence: ClassVar[str] = "ours"
    deviations: ClassVar[str] = ""
    status: ClassVar[str] = "stable"
    example: ClassVar[dict[str, Any]] = {"file": "order.json"}

    def propose(
        self,
        evaluator: SubLayers,
        enough: Callable[[frozenset[str]], bool],
        progress: Progress = NULL_PROGRESS,
        kind: str = "sublayers",
    ) -> Order:
        """The first steps of the order, up to the one that reaches the budget.

        Args:
            evaluator: tells which sub-layers there are; nothing is run.
            enough: whether this set of removed sub-layers reaches the budget.
            progress: unused.
            kind: kind of unit that the recipe's step removes; `pairs` for sub-layers that must go on taking turns.
        Raises:
            UsageError: if the file is not such a file, or its order is not for this kind of unit.
            PlanError: if it removes what the model does not have or what is protected, or stops before the budget.
        """
        method, steps = _read(Path(self.file).expanduser())
        _check(steps, kind, evaluator, self.file)
        removed: frozenset[str] = frozenset()
        taken: list[OrderStep] = []
        for step in steps:
            if enough(removed):
                break
            removed |= set(step.units)
            taken.append(step)
        if not enough(removed):
            raise PlanError(
                "the order stops before the budget is reached",
                why=f"it has {len(steps)} steps",
                hint="write a longer one with `prunekit score --limit`, or remove less",
                at=self.file,
            )
        return Order("replay", tuple(taken), {"file": self.file, "order_of": method})


def _read(path: Path) -> tuple[str, tuple[OrderStep, ...]]:
    hint = "write one with `prunekit score MODEL --method finercut --output order.json`"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"`{path}` cannot be read", why=error.strerror or str(error), hint=hint) from error
    except ValueError as error:
        raise UsageError(f"`{path}` is not JSON", why=str(error), hint=hint) from error
    results = data.get("results") if isinstance(data, dict) else None
    try:
        (order,) = list(results or [])
        steps = tuple(OrderStep(tuple(step["units"]), float(step["distance"])) for step in order["steps"])
        method = str(order["method"])
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(
            f"`{path}` holds no removal order", why="it needs `results` with one order", hint=hint
        ) from error
    if not all(step.units and all(isinstance(unit, str) for unit in step.units) for step in steps):
        raise UsageError(f"`{path}` holds no removal order", why="a step names no units", hint=hint)
    return method, steps


def _check(steps: Collection[OrderStep], kind: str, evaluator: SubLayers, file: str) -> None:
    units = [unit for step in steps for unit in step.units]
    unknown = sorted(set(units) - set(evaluator.addresses))
    if unknown:
        why = f"{len(unknown)} units of the order are not in it"
        raise PlanError(f"the model has no `{unknown[0]}`", why=why, at=file)
    twice = [unit for unit in units if units.count(unit) > 1]
    if twice:
        raise PlanError(f"the order removes `{twice[0]}` twice", at=file)
    safe = sorted(evaluator.protected.intersection(units))
    if safe:
        hint = "search again with `protect`"
        raise PlanError(f"the order removes `{safe[0]}`, which is protected", hint=hint, at=file)
    others = [step.units[0] for step in steps if not _is_of(step.units, kind, evaluator.addresses)]
    if others:
        why, hint = f"it removes `{others[0]}`", "use `remove: sublayers`"
        raise UsageError(f"the order is not of {kind}", why=why, hint=hint, at=file)


def _is_of(units: tuple[str, ...], kind: str, addresses: tuple[str, ...]) -> bool:
    if kind == "blocks":
        block = units[0].rpartition(".")[0]
        return set(units) == {address for address in addresses if address.rpartition(".")[0] == block}
    return kind in ("sublayers", "pairs") or all(unit.rpartition(".")[2] == kind for unit in units)
