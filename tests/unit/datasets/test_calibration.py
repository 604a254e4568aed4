"""Calibration sequences chosen by a metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prunekit.core.recipe import InvalidRecipeError, parse_recipe
from prunekit.core.recipe_select import Select
from prunekit.datasets.calibration import Sequences, pool_size, selected
from tests.tiny import tiny_inputs, tiny_model


def test_pool_is_larger_by_what_is_not_kept() -> None:
    assert [pool_size(10, Select(metric="loss", keep=keep)) for keep in (0.25, 0.3, 1.0)] == [40, 34, 10]


def test_the_hardest_sequences_stay_in_their_order() -> None:
    model, pool = tiny_model("llama", dtype=torch.float32), tiny_inputs("llama", batch=8)
    kept, why = selected(pool, 3, Select(metric="loss", keep=0.4, rule="hard"), model, 0)
    expected = np.sort(np.argsort(-Sequences(pool, model).surprises()[:, 0])[:3])
    assert torch.equal(kept["input_ids"], pool["input_ids"][expected])
    assert why == "hard ones by loss: asked for"


def test_auto_keeps_easy_calibration_text() -> None:
    model, pool = tiny_model("llama", dtype=torch.float32), tiny_inputs("llama", batch=8)
    assert selected(pool, 3, Select(metric="loss", keep=0.4), model, 0)[1].startswith("easy")


def recipe(select: dict) -> dict:
    step = {"remove": "blocks", "by": {"score": "block_influence"}, "budget": {"units": 1}}
    return {"schema": 1, "model": {"source": "m"}, "calibrate": {"select": select}, "steps": [step]}


def test_recipe_with_a_selection_keeps_it() -> None:
    found = parse_recipe(recipe({"metric": "ssl_prototypes", "keep": 0.3}))
    assert found.effective()["calibrate"]["select"] == {"metric": "ssl_prototypes", "keep": 0.3, "rule": "auto"}


def test_healing_selects_likewise() -> None:
    plain = {**recipe({"metric": "loss", "keep": 0.5}), "calibrate": {}}
    plain["heal"] = {"method": "distill", "select": {"metric": "el2n", "keep": 0.5, "rule": "easy"}}
    found = parse_recipe(plain)
    assert found.effective()["heal"]["select"] == {"metric": "el2n", "keep": 0.5, "rule": "easy"}
    plain["heal"]["select"]["metric"] = "forgetting"
    with pytest.raises(InvalidRecipeError) as raised:
        parse_recipe(plain)
    assert [problem.what for problem in raised.value.problems] == ["`metric: forgetting` is not possible here"]


@pytest.mark.parametrize(
    ("select", "what"),
    [
        ({"metric": "grad_norm", "keep": 0.3}, "`metric: grad_norm` is not possible here"),
        ({"metric": "lss", "keep": 0.3}, "no metric named `lss`"),
        ({"metric": "loss", "keep": 1.5}, "`keep: 1.5` must be at most 1"),
        ({"metric": "loss"}, "`keep` is missing"),
        ({"metric": "loss", "keep": 0.3, "rule": "hrd"}, "`rule: hrd` is not allowed"),
    ],
)
def test_wrong_selection_is_one_problem(select: dict, what: str) -> None:
    with pytest.raises(InvalidRecipeError) as raised:
        parse_recipe(recipe(select))
    assert [problem.what for problem in raised.value.problems] == [what]
