"""What a race runs and what it leaves out, on made-up distances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from prunekit.search._distances import DISTANCES
from prunekit.search._memory import Memory, Trust, levels
from prunekit.search._race import Runner, race

ALIVE = [f"blocks.{i}.{kind}" for i in range(6) for kind in ("attention", "ffn")]
SURE = Trust(near=0.5, far=0.8, fade=0.5, least=0.1, first_look=0.5)


class Table:
    """Stands for an evaluator of two parts, the second three times the first; distances are given."""

    weights = (0.25, 0.75)
    distance = DISTANCES["kl"]
    ahead = 0

    def __init__(self, added: dict[str, tuple[float, float]]) -> None:
        self.added = added
        self.measured: list[tuple[str, int]] = []

    def width(self, part: int) -> int:
        return 1

    def mean(self, by_part: Sequence[float]) -> float:
        return sum(w * v for w, v in zip(self.weights, by_part, strict=True))

    def measure(self, sets: Sequence[frozenset[str]], part: int, likely: Any = ()) -> list[float]:
        (units,) = sets
        (unit,) = units
        self.measured.append((unit, part))
        return [1.0 + self.added[unit][part]]


def runner(unit: str, *known: tuple[float, float], guess: float = 0.5) -> Runner:
    return Runner((unit,), frozenset({unit}), (1.0, 1.0), known, guess)


def distance(_: Runner, value: float) -> float:
    return value


def run(table: Table, runners: list[Runner], limit: float = math.inf) -> Runner:
    evaluator: Any = table
    return race(evaluator, runners, distance, limit)


def test_the_best_wins_and_the_hopeless_do_not_run() -> None:
    table = Table({"a": (0.2, 0.2), "b": (0.1, 0.1)})
    known = [
        runner("a", (0.2, 0.8), (0.2, 0.8)),
        runner("b", (0.1, 0.8), (0.1, 0.8)),
        runner("c", (0.5, 0.8), (0.5, 0.8)),
    ]
    assert run(table, known).units == ("b",)
    assert {unit for unit, _ in table.measured} == {"b"}


def test_a_candidate_stops_where_it_falls_behind() -> None:
    table = Table({"a": (0.9, 0.1), "b": (0.3, 0.3)})
    assert run(table, [runner("a", (0.2, 0.8), (0.2, 0.8)), runner("b", (0.3, 0.8), (0.3, 0.8))]).units == ("b",)
    assert table.measured == [("a", 0), ("b", 0), ("b", 1)]


def test_whoever_may_have_lost_all_runs() -> None:
    table = Table({"a": (0.1, 0.1), "b": (0.0, 0.0)})
    assert run(table, [runner("a", (0.1, 0.8), (0.1, 0.8)), runner("b", (9.0, 0.0), (9.0, 0.0))]).units == ("b",)


def test_the_first_of_equals_wins() -> None:
    table = Table({"a": (0.1, 0.1), "b": (0.1, 0.1)})
    assert run(table, [runner("a"), runner("b")]).units == ("a",)


def test_a_race_ends_where_nobody_stays_below_the_limit() -> None:
    table = Table({"a": (0.5, 0.5)})
    found = run(table, [runner("a", (0.5, 0.8), (0.5, 0.8))], limit=1.2)
    assert found.found == []
    assert table.measured == []


def test_a_bound_is_what_was_added_less_what_may_be_lost() -> None:
    evaluator: Any = Table({})
    assert runner("a", (0.4, 0.5), (0.8, 0.75)).bound(evaluator) == pytest.approx(1 + 0.25 * 0.2 + 0.75 * 0.6)
    half = runner("a", (0.4, 0.5))
    assert half.bound(evaluator) == pytest.approx(1 + 0.25 * 0.2 + 0.75 * 0.4 * 0.5 * 0.5)
    half.found = [1.6]
    assert half.bound(evaluator) == pytest.approx(1 + 0.25 * 0.6 + 0.75 * 0.6 * 0.5)
    half.found = [1.6, 1.2]
    assert half.bound(evaluator) == pytest.approx(1 + 0.25 * 0.6 + 0.75 * 0.2)


def test_what_lowered_the_distance_may_lower_it_more() -> None:
    evaluator: Any = Table({})
    assert runner("a", (-0.4, 0.5), (-0.4, 0.5)).bound(evaluator) == pytest.approx(1 - 0.4 * 1.5)


def test_levels_count_survivors_in_widths_of_what_went() -> None:
    around = levels(("blocks.2.attention",), ALIVE)
    assert [unit for unit, level in around.items() if level == 0] == [
        "blocks.1.ffn",
        "blocks.2.attention",
        "blocks.2.ffn",
    ]
    assert set(around) == set(ALIVE[1:8])
    around = levels(("blocks.2.attention", "blocks.2.ffn"), ALIVE)
    assert {unit for unit, level in around.items() if level == 0} == set(ALIVE[2:8])
    assert set(around) == set(ALIVE)


def learnt(trust: Trust, found: dict[str, list[float]]) -> Memory:
    """Memory of one step of a search whose base is 1 on both parts."""
    memory, evaluator = Memory(trust), Table({})
    runners = [runner(unit) for unit in found]
    for one in runners:
        one.found = found[one.units[0]]
    memory.learn(runners, evaluator)  # type: ignore[arg-type]
    return memory


def shares(memory: Memory, unit: str) -> list[float]:
    return [share for _, share in memory.runner((unit,), frozenset(), (1.0, 1.0)).known]


def test_shares_depend_on_how_near_and_how_long_ago() -> None:
    far, near, beside = ALIVE[9], ALIVE[5], ALIVE[3]
    memory = learnt(SURE, {unit: [1.5, 1.5] for unit in (far, near, beside)})
    memory.went((ALIVE[2],), ALIVE)
    assert shares(memory, far) == [0.8, 0.8]
    assert shares(memory, near) == [0.5, 0.5]
    assert shares(memory, beside) == [0.0, 0.0]
    memory.went((ALIVE[0],), ALIVE)
    assert shares(memory, far) == [0.4, 0.4]
    for _ in range(5):
        memory.went((ALIVE[0],), ALIVE)
    assert shares(memory, far) == [0.1, 0.1]


def test_a_part_not_run_again_stays_old() -> None:
    unit = ALIVE[9]
    memory = learnt(SURE, {unit: [1.5, 1.5]})
    memory.went((ALIVE[0],), ALIVE)
    again = memory.runner((unit,), frozenset(), (1.0, 1.0))
    again.found = [1.5]
    memory.learn([again], Table({}))  # type: ignore[arg-type]
    memory.went((ALIVE[1],), ALIVE)
    assert shares(memory, unit) == [0.8, 0.4]


def test_a_search_that_is_wrong_expects_less() -> None:
    unit, other = ALIVE[9], ALIVE[11]
    memory = learnt(SURE, {unit: [1.5, 1.5], other: [1.5, 1.5]})
    memory.went((ALIVE[0],), ALIVE)
    again = memory.runner((unit,), frozenset(), (1.0, 1.0))
    again.found = [1.1, 1.4]
    memory.learn([again], Table({}))  # type: ignore[arg-type]
    assert shares(memory, other) == pytest.approx([0.2, 0.2])
