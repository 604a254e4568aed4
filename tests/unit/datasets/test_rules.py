"""What a rule keeps."""

from __future__ import annotations

import numpy as np
import pytest

from prunekit.core.errors import UsageError
from prunekit.datasets.rules import PLENTY, Facts, Rule, choose, decide, ranking

SCORES = np.array([0.1, 0.9, 0.5, 0.7, 0.3, 0.2])


def test_hard_keeps_the_highest_and_easy_the_lowest() -> None:
    assert choose(ranking(SCORES, True, 0), Rule(keep=0.5), 6).tolist() == [1, 2, 3]
    assert choose(ranking(SCORES, False, 0), Rule(keep=0.5), 6).tolist() == [0, 4, 5]


def test_equal_scores_fall_in_an_order_of_the_seed() -> None:
    equal = np.zeros(100)
    assert ranking(equal, True, 1).tolist() == ranking(equal, True, 1).tolist()
    assert ranking(equal, True, 1).tolist() != ranking(equal, True, 2).tolist()
    assert ranking(equal, True, 1).tolist() != list(range(100))


def test_class_floor_keeps_part_of_every_class() -> None:
    labels = np.array([0] * 80 + [1] * 20)
    scores = np.concatenate([np.arange(80) + 100, np.arange(20)])
    order = ranking(scores, True, 0)
    without = choose(order, Rule(keep=0.5, class_floor=0), 100, labels)
    half = choose(order, Rule(keep=0.5, class_floor=0.5), 100, labels)
    whole = choose(order, Rule(keep=0.5, class_floor=1), 100, labels)
    assert [int((labels[kept] == 1).sum()) for kept in (without, half, whole)] == [0, 5, 10]
    assert len(without) == len(half) == len(whole) == 50
    assert half[-5:].tolist() == [95, 96, 97, 98, 99]


def test_token_budget_is_kept() -> None:
    tokens = np.array([50, 10, 20, 30, 5, 5])
    kept = choose(ranking(SCORES, True, 0), Rule(tokens=45), 6, tokens=tokens)
    assert kept.tolist() == [1, 3]
    assert tokens[kept].sum() <= 45


def test_examples_that_are_missing_from_the_order_never_stay() -> None:
    assert choose(np.array([3, 0]), Rule(keep=1.0), 6).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("n_keep", "facts", "rule"),
    [
        (1000 * PLENTY["head"], Facts(trained=1000), "hard"),
        (1000 * PLENTY["head"] - 1, Facts(trained=1000), "easy"),
        (1000 * PLENTY["model"], Facts(trained=1000, trains="model"), "hard"),
        (10, Facts(tokens=4_000, params=100), "hard"),
        (10, Facts(tokens=3_999, params=100), "easy"),
        (10**9, Facts(), "easy"),
    ],
)
def test_auto_keeps_hard_where_data_is_plenty(n_keep: int, facts: Facts, rule: str) -> None:
    found, why = decide("auto", n_keep, 0.5, facts)
    assert found == rule
    assert "a parameter" in why or "counts as scarce" in why


@pytest.mark.parametrize(
    "wrong",
    [{"keep": 0.0}, {"keep": 1.5}, {"keep": -0.1}, {"examples": 0}, {"tokens": 0}, {}, {"keep": 0.5, "examples": 3}],
)
def test_budget_out_of_range_is_an_error(wrong: dict) -> None:
    with pytest.raises(UsageError):
        Rule(**wrong)


def test_class_floor_out_of_range_is_an_error() -> None:
    with pytest.raises(UsageError, match="class_floor"):
        Rule(keep=0.5, class_floor=1.1)


def test_more_examples_than_there_are_is_an_error() -> None:
    with pytest.raises(UsageError, match="more than the 6"):
        choose(ranking(SCORES, True, 0), Rule(examples=7), 6)
