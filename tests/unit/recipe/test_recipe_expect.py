"""`Expect.judge`: which limits hold."""

from __future__ import annotations

import pytest

from prunekit.core.recipe import EXPECTATIONS, Expect


def test_every_expectation_is_a_key_and_the_other_way_round() -> None:
    assert set(EXPECTATIONS) == set(Expect.model_fields)


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


def test_no_limits_no_entries() -> None:
    assert Expect().judge({"params": 1}) == []
