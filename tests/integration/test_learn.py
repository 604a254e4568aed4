"""Learned masks and hidden channels from start to end: a recipe to a folder that loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit import pipeline
from prunekit.core.errors import PlanError, UsageError
from prunekit.core.recipe import load_recipe, parse_recipe
from prunekit.export.verify import VerifyReport
from prunekit.modeling.load import load_model
from prunekit.pipeline.repair import repair_inputs
from prunekit.structure.view import ModelView

Small = Callable[[str], Path]
LEARN = {
    "method": "vib",
    "remove": ["neurons", "kv_groups"],
    "budget": {"remove": 0.25},
    "steps": 4,
    "batch": 4,
    "length_tokens": 16,
    "sequences": 40,
    "check_every": 2,
    "held_out": 0.2,
}
HEAL = {"method": "distill", "steps": 2, "batch": 4, "length_tokens": 16, "sequences": 40, "check_every": 2}
REPAIR = {"method": "least_squares", "calibrate": {"sequences": 4, "length_tokens": 16}}


def recipe(folder: Path, **sections: Any) -> Any:
    return parse_recipe({"schema": 1, "model": {"source": str(folder)}, **sections})


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the two fresh processes out."""
    monkeypatch.setattr("prunekit.export.verify.verify", lambda *arguments, **named: VerifyReport(Path(), ()))


def removed(made: Any) -> float:
    return 1 - made.after.block_params / made.before.block_params


@pytest.mark.slow
def test_masks_are_healed_after_the_cut(small: Small, tmp_path: Path, unverified: None) -> None:
    asked = recipe(
        small("llama"), learn=LEARN, heal=HEAL, evaluate={"perplexity": {"sequences": 2, "length_tokens": 16}}
    )
    result = pipeline.run(asked, tmp_path / "o")
    assert len({side["perplexity"] for side in (result.before, result.cut, result.after)}) == 3
    assert result.heal["changed_tensors"] > 0


def test_masks_are_learned_cut_and_told(small: Small, tmp_path: Path, unverified: None) -> None:
    step = {"remove": "ffn", "by": {"score": "random"}, "budget": {"units": 1}}
    asked = recipe(
        small("llama"),
        steps=[step],
        learn={**LEARN, "steps": 2},
    )
    result = pipeline.run(asked, tmp_path / "o")
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    plan = result.made.plan
    assert len(plan.drop) == 1
    # The step's FFN counts for the step, the budget of `learn` for `learn`.
    assert result.made.learn["removed"] >= 0.25 * 0.995
    assert removed(result.made) > 0.25 + 0.1
    manifest = json.loads((tmp_path / "o" / "prunekit.json").read_text())
    assert manifest["learn"]["removed"] == result.made.learn["removed"]
    assert "Masks by vib over neurons, kv_groups: 2 steps" in (tmp_path / "o" / "README.md").read_text()
    assert load_recipe(tmp_path / "o" / "recipe.yaml").effective() == asked.effective()


@pytest.mark.slow
def test_repair_takes_the_place_of_factors(small: Small, tmp_path: Path, unverified: None) -> None:
    result = pipeline.run(recipe(small("llama"), learn=LEARN, repair=REPAIR), tmp_path / "o")
    assert result.made.learned
    view = ModelView.open(tmp_path / "o")
    name = view.output(view.sublayer("blocks.3.ffn")).name
    expected = result.made.repaired["blocks.3.ffn"].weight
    torch.testing.assert_close(view.checkpoint.read(name), expected, rtol=0, atol=0)


def test_repair_knows_what_is_learned(small: Small) -> None:
    asked = recipe(small("bert"), learn=LEARN, repair={**REPAIR, "method": "mean_bias"})
    assert len(repair_inputs(asked, ModelView.open(small("bert")))["input_ids"]) == 4


def test_repair_of_trained_weights_is_refused(small: Small, tmp_path: Path) -> None:
    asked = recipe(small("llama"), learn={**LEARN, "variant": "full"}, repair=REPAIR)
    with pytest.raises(UsageError, match="does not go with trained weights"):
        pipeline.run(asked, tmp_path / "o")


def test_encoder_loses_heads_by_usage(small: Small, tmp_path: Path, unverified: None) -> None:
    asked = {**LEARN, "method": "shrp", "remove": ["kv_groups"], "budget": {"remove": 0.2}}
    result = pipeline.run(recipe(small("bert"), learn=asked), tmp_path / "o")
    assert removed(result.made) >= 0.2 * 0.995
    assert load_model(tmp_path / "o").config.model_type == "prunekit_bert"
    told = json.loads((tmp_path / "o" / "prunekit.json").read_text())["learn"]
    assert {len(heads) for heads in told["usage"].values()} == {4}
    assert "Masks by shrp over kv_groups: 4 steps" in (tmp_path / "o" / "README.md").read_text()


def test_heads_of_a_decoder_are_not_routed(small: Small, tmp_path: Path) -> None:
    asked = {**LEARN, "method": "shrp", "remove": ["kv_groups"]}
    with pytest.raises(UsageError, match="shrp` needs a text encoder"):
        pipeline.run(recipe(small("llama"), learn=asked), tmp_path / "o")
    bias = {**REPAIR, "method": "mean_bias"}
    with pytest.raises(UsageError, match="does not go with trained weights"):
        pipeline.run(recipe(small("bert"), learn=asked, repair=bias), tmp_path / "o")
    assert not list(tmp_path.iterdir())


def test_budget_out_of_reach_fails_before_training(small: Small, tmp_path: Path) -> None:
    asked = recipe(small("llama"), learn={**LEARN, "remove": ["kv_groups"], "budget": {"remove": 0.9}})
    with pytest.raises(PlanError, match="budget of `learn` cannot be met"):
        pipeline.run(asked, tmp_path / "o")
    assert not list(tmp_path.iterdir())


def test_form_that_masks_cannot_have_fails_before_training(small: Small, tmp_path: Path) -> None:
    asked = {"learn": LEARN, "export": {"layout": "stock"}}
    with pytest.raises(PlanError, match="cannot be a stock model"):
        pipeline.run(recipe(small("llama"), **asked), tmp_path / "o")
    with pytest.raises(PlanError, match="`require: vllm` cannot be kept"):
        pipeline.run(recipe(small("llama"), learn=LEARN, require=["vllm"]), tmp_path / "o")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_hidden_channels_go_by_magnitude_and_load_in_fresh_processes(small: Small, tmp_path: Path) -> None:
    step = {"remove": "hidden", "by": {"score": "magnitude"}, "budget": {"remove": 0.25, "multiple_of": 4}}
    result = pipeline.run(recipe(small("qwen3"), steps=[step], export={"layout": "stock"}), tmp_path / "o")
    assert result.verified.ok
    assert load_model(tmp_path / "o").config.hidden_size == 24


def test_units_chosen_for_each_input_lie_beside_the_dense_model(small: Small, tmp_path: Path, unverified: None) -> None:
    learn = {**LEARN, "method": "fire_together", "remove": ["neurons"], "tokens": 4}
    asked = recipe(small("llama"), learn=learn, evaluate={"perplexity": {"sequences": 2, "length_tokens": 16}})
    result = pipeline.run(asked, tmp_path / "o")
    dense = ModelView.open(small("llama")).checkpoint
    ours = ModelView.open(tmp_path / "o").checkpoint
    assert all(torch.equal(ours.read(name), dense.read(name)) for name in dense.tensors)
    assert result.made.layout.kind == "stock"
    # Measured with the chosen units, as `prunekit evaluate` does.
    assert result.after["perplexity"] != result.before["perplexity"]
    assert 0 < result.made.learn["removed"] < 0.75
    manifest = json.loads((tmp_path / "o" / "prunekit.json").read_text())
    assert manifest["loads"]["chosen units"].startswith("yes: dynamic: shapes unchanged, no parameter saved")
    assert manifest["loads"]["transformers"].startswith("yes")
    assert "Dynamic: shapes unchanged, no parameter saved" in (tmp_path / "o" / "README.md").read_text()
    assert load_recipe(tmp_path / "o" / "recipe.yaml").effective() == asked.effective()


def test_what_would_change_the_model_does_not_go_with_chosen_units(small: Small, tmp_path: Path) -> None:
    learn = {**LEARN, "method": "fire_together", "remove": ["neurons"], "tokens": 4}
    with pytest.raises(UsageError, match="does not go with `repair`, `heal`"):
        pipeline.run(recipe(small("llama"), learn=learn, heal=HEAL, repair=REPAIR), tmp_path / "o")
    assert not list(tmp_path.iterdir())


def test_hidden_states_of_two_widths_are_not_compared(small: Small, tmp_path: Path) -> None:
    step = {"remove": "hidden", "by": {"score": "magnitude"}, "budget": {"remove": 0.25, "multiple_of": 4}}
    for section in (
        {"evaluate": {"embedding": {"sequences": 2}}},
        {"repair": REPAIR},
        {"heal": {**HEAL, "hidden": 1.0}},
    ):
        with pytest.raises(UsageError, match="does not go with the removal of hidden channels"):
            pipeline.run(recipe(small("llama"), steps=[step], **section), tmp_path / "o")
