"""The knapsack behind latency budgets, against trying every choice."""

from __future__ import annotations

import itertools
import random

import pytest

from prunekit.core.errors import PlanError
from prunekit.plan import knapsack
from prunekit.plan.knapsack import least_loss

Items = list[list[tuple[float, float]]]


def total(items: Items, taken: tuple[int, ...] | list[int]) -> tuple[float, float]:
    """Cost and loss of a choice."""
    options = [options[place] for options, place in zip(items, taken, strict=True)]
    return sum(cost for cost, _ in options), sum(loss for _, loss in options)


def best_loss(items: Items, limit: float) -> float:
    """The least loss of all choices within the limit."""
    choices = itertools.product(*(range(len(options)) for options in items))
    return min(loss for cost, loss in (total(items, taken) for taken in choices) if cost <= limit)


def test_the_worked_example() -> None:
    assert least_loss([[(4, 0), (1, 3)], [(4, 0), (1, 2)]], 5) == [0, 1]


def drawn(seed: int) -> tuple[Items, float, float]:
    """Items, the cost of their cheapest choice, and a limit above it."""
    draw = random.Random(seed)
    items = [[(draw.uniform(0, 9), draw.uniform(0, 5)) for _ in range(draw.randint(1, 4))] for _ in range(7)]
    least = sum(min(cost for cost, _ in options) for options in items)
    return items, least, least + draw.uniform(0, 25)


@pytest.mark.parametrize("seed", range(8))
def test_loss_is_the_least_there_is(seed: int) -> None:
    items, _, limit = drawn(seed)
    cost, loss = total(items, least_loss(items, limit))
    assert cost <= limit + 1e-6
    assert loss == pytest.approx(best_loss(items, limit))


@pytest.mark.parametrize("seed", range(8))
def test_the_limit_holds_when_choices_are_thinned(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "STATES", 40)
    items, least, limit = drawn(seed)
    cost, loss = total(items, least_loss(items, limit))
    assert cost <= limit + 1e-6
    # Each item may put the choice a bucket further off.
    room = limit - least
    assert best_loss(items, limit) - 1e-9 <= loss <= best_loss(items, least + room * (1 - 7 / 40)) + 1e-9


def test_a_greedy_choice_is_beaten() -> None:
    # By loss for each millisecond saved the first would go, and then the last still has to.
    items = [[(6, 0), (0, 6.0)], [(10, 0), (0, 10.5)]]
    assert least_loss(items, 6) == [0, 1]


def test_costs_that_all_fit_lose_nothing() -> None:
    assert least_loss([[(4, 0), (1, 3)], [(4, 0), (1, 2)]], 100) == [0, 0]


def test_the_cheapest_choice_fits_exactly() -> None:
    assert least_loss([[(0.3, 0), (0.1, 3)], [(0.4, 0), (0.2, 2)]], 0.1 + 0.2) == [1, 1]


def test_too_little_room_is_an_error() -> None:
    with pytest.raises(PlanError, match="nothing is that cheap"):
        least_loss([[(4, 0), (1, 3)]], 0.5)
