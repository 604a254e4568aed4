"""`Expect.judge`: which limits hold."""

from __future__ import annotations

import pytest

from prunekit.core.recipe import EXPECTATIONS, Expect


def test_every_expectation_is_a_key_and_the_other_way_round() -> None:
    # `figures` holds limits of tasks, whose names no list here could know.
    assert {*EXPECTATIONS, "figures"} == set(Expect.model_fields)


@pytest.mark.parametrize(
    ("expect", "measured", "ok"),
    [
        ({"params_max": 10.0}, {"params": 10}, True),
        ({"params_max": 10.0}, {"params": 11}, False),
        ({"embedding_cosine_min": 0.9}, {"embedding_cosine": 0.9}, True),
        ({"embedding_cosine_min": 0.9}, {"embedding_cosine": 0.8}, False),
        ({"loads_stock": True}, {"loads_stock": True}, True),
        ({"loads_stock": True}, {"loads_stock": False}, False),
        ({"perplexity_max": 9.0}, {"perplexity": float("nan")}, False),
        ({"perplexity_max": 9.0}, {}, False),
    ],
)
def test_limit_is_judged(expect, measured, ok) -> None:
    (entry,) = Expect(**expect).judge(measured)
    assert entry["ok"] is ok
    assert entry["name"] in expect


@pytest.mark.parametrize(
    ("key", "limit", "ok"),
    [
        ("arc_easy.acc_min", 0.5, True),
        ("arc_easy.acc_min", 0.6, False),
        ("arc_easy.acc_max", 0.4, False),
        ("passkey.acc_256_min", 1.0, True),
        ("arc_easy.acc_norm_min", 0.0, False),
    ],
)
def test_limit_of_a_task_is_judged(key, limit, ok) -> None:
    measured = {"figures": {"arc_easy.acc": 0.5, "passkey.acc_256": 1.0}}
    (entry,) = Expect(figures={key: limit}).judge(measured)
    assert entry["ok"] is ok
    assert entry["name"] == key


def test_no_limits_no_entries() -> None:
    assert Expect().judge({"params": 1}) == []
