"""Calibration with weights that stay in their files: the same scores, each weight read once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prunekit import pipeline
from prunekit.core.recipe import parse_recipe
from prunekit.core.types import Scores
from prunekit.modeling import offload

Small = Callable[[str], Path]


def scores(folder: Path, kind: str, method: str, wanted: str) -> Scores:
    data = {
        "schema": 1,
        "model": {"source": str(folder), "offload": wanted},
        "calibrate": {"sequences": 3, "length_tokens": 16},
        "steps": [{"remove": kind, "by": {"score": method}, "budget": {"units": 1}}],
    }
    (found,) = pipeline.make_plan(parse_recipe(data)).orders
    assert isinstance(found, Scores)
    return found


@pytest.mark.parametrize(
    ("family", "kind", "method"),
    [
        ("llama", "blocks", "block_influence"),
        ("llama", "neurons", "wanda"),
        ("gpt2", "blocks", "angular"),
        ("bert", "sublayers", "block_influence"),
    ],
)
def test_scores_are_those_of_the_model_in_memory(small: Small, family: str, kind: str, method: str) -> None:
    inside, outside = (scores(small(family), kind, method, wanted) for wanted in ("never", "always"))
    assert outside.units == inside.units
    assert outside.values == pytest.approx(inside.values, rel=1e-5, abs=1e-6)
    assert len(set(outside.values)) > 1


def test_a_search_removes_the_same_with_weights_in_files(small: Small) -> None:
    plans = []
    for wanted in ("never", "always"):
        data = {
            "schema": 1,
            "model": {"source": str(small("llama")), "offload": wanted},
            "calibrate": {"sequences": 2, "length_tokens": 16},
            "steps": [{"remove": "sublayers", "by": {"search": "finercut"}, "budget": {"units": 2}}],
        }
        plans.append(pipeline.make_plan(parse_recipe(data)).plan)
    assert plans[0] == plans[1]


def test_auto_offloads_what_does_not_fit(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def load(*given: object) -> None:
        asked.append(bool(given[-1]))
        raise KeyboardInterrupt

    monkeypatch.setattr("prunekit.modeling.load.load_model", load)
    for free in (1 << 40, 1000):
        monkeypatch.setattr(offload, "free_bytes", lambda free=free: free)
        with pytest.raises(KeyboardInterrupt):
            scores(small("llama"), "blocks", "block_influence", "auto")
    assert asked == [False, True]
