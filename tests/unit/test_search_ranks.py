"""A search that runs ahead, as several ranks do, goes the way it goes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from prunekit.calibrate.stack import Stack
from prunekit.core.ranks import ALONE, Ranks
from prunekit.search._evaluator import Evaluator
from prunekit.search._race import Runner, race
from prunekit.search.finercut import FinerCut
from tests.tiny import tiny_inputs, tiny_model
from tests.unit.test_search_race import Table, distance, runner


@dataclass(frozen=True)
class AllOfThem(Ranks):
    """Does the work of every rank."""

    def mine(self, number: int) -> bool:
        return True

    def gather(self, parts: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        return [dict(parts)]


def searched(ranks: Ranks, remove: int, **knobs: Any) -> tuple[Any, Any, float]:
    evaluator = Evaluator(
        Stack(tiny_model("llama")),
        tiny_inputs("llama", batch=24, length=16),
        lambda address, of: 2.0 if address.endswith("ffn") else 1.0,
        batch_tokens=64,
        ranks=ranks,
    )
    order = FinerCut(**knobs).propose(evaluator, lambda removed: len(removed) >= remove)
    return order.steps, order.provenance["evaluations"], evaluator.sublayer_runs()


@pytest.mark.parametrize(
    "knobs",
    [{}, {"distance": "loss", "per": "params"}, {"exact": True}, {"candidates": "mixed", "swaps": 2}],
    ids=["lazy", "loss", "exact", "swaps"],
)
def test_running_ahead_changes_nothing_but_the_work(knobs: dict[str, Any]) -> None:
    steps, evaluations, runs = searched(ALONE, 4, **knobs)
    ahead_steps, ahead_evaluations, ahead_runs = searched(AllOfThem(0, 3), 4, **knobs)
    assert ahead_steps == steps
    assert ahead_evaluations == evaluations
    assert ahead_runs >= runs


def test_a_race_says_what_will_be_asked_for_next() -> None:
    class Telling(Table):
        ahead = 2

        def measure(self, sets: Any, part: int, likely: Any = ()) -> list[float]:
            self.told.append([(unit, at) for some, at in likely for (unit,) in some])
            return super().measure(sets, part)

        told: list[list[tuple[str, int]]] = []  # noqa: RUF012

    table = Telling({name: (0.1 * number, 0.1 * number) for number, name in enumerate("abcd", 1)})
    evaluator: Any = table
    runners: list[Runner] = [runner(name) for name in "abcd"]
    assert race(evaluator, runners, distance).units == ("a",)
    # Nothing is known of any at first: all must be looked at, more than two.
    assert table.told[0] == [("b", 0), ("c", 0), ("d", 0)]
    # Then the best goes on, and the two that come next if it falls behind.
    assert table.measured[-1] == ("a", 1)
    assert table.told[-1] == [("b", 1), ("c", 1)]
