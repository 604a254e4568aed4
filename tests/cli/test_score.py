"""`prunekit score`: knobs, tables, files."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from prunekit.cli.score import knobs, score
from prunekit.core.errors import UsageError
from prunekit.core.types import Order, OrderStep, Scores


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Recipes handed to the pipeline, which answers with three scored blocks, or an order for a search."""
    seen: list[Any] = []
    scores = Scores("random", "blocks", ("blocks.0", "blocks.1", "blocks.2"), (0.5, 0.125, 0.25), {})
    order = Order("finercut", (OrderStep(("blocks.1.ffn",), 0.5), OrderStep(("blocks.0.attention",), 0.75)), {})

    def make_plan(recipe: Any, **options: Any) -> SimpleNamespace:
        seen.append(recipe)
        searched = recipe.steps[0].by.search is not None
        return SimpleNamespace(orders=[order if searched else scores])

    monkeypatch.setattr("prunekit.pipeline.make_plan", make_plan)
    return seen


def test_lowest_score_comes_first(invoke) -> None:
    done = invoke(score, "m", "--method", "random")
    assert done.exit_code == 0, done.exception
    units = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert units == ["blocks.1", "blocks.2", "blocks.0"]


def test_search_shows_its_order(invoke) -> None:
    done = invoke(score, "m", "--method", "finercut", "--kind", "sublayers")
    assert done.exit_code == 0, done.exception
    assert [line.split()[1] for line in done.stdout.splitlines()[1:]] == ["blocks.1.ffn", "blocks.0.attention"]


def test_scores_are_written_in_full_and_named_last(invoke, tmp_path) -> None:
    done = invoke(score, "m", "--method", "random", "--output", tmp_path / "s.json")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "s.json")
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["results"][0]["values"] == [0.5, 0.125, 0.25]


def test_knob_reaches_the_recipe(invoke, made) -> None:
    invoke(score, "m", "--method", "random", "--set", "seed=7")
    assert made[0].steps[0].by.knobs == {"seed": 7}


def test_limit_of_a_score_is_refused(invoke, made) -> None:
    assert isinstance(invoke(score, "m", "--method", "random", "--limit", "3").exception, UsageError)
    assert made == []


def test_unknown_method_is_refused_before_any_work(invoke, made) -> None:
    assert isinstance(invoke(score, "m", "--method", "gardner").exception, UsageError)
    assert made == []


def test_knob_values_are_typed() -> None:
    assert knobs(["exact=true", "protect_front=0.4", "distance=js"]) == {
        "exact": True,
        "protect_front": 0.4,
        "distance": "js",
    }


@pytest.mark.parametrize("text", ["exact", "=3", "a=[1"])
def test_unreadable_knob_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        knobs([text])
    assert text in str(raised.value)
