"""`load_recipe` and `parse_recipe` on sound recipes: values, defaults, overrides, provenance."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from prunekit.core import recipe_files
from prunekit.core.errors import RecipeError, UsageError
from prunekit.core.recipe import load_recipe, parse_recipe
from prunekit.core.recipe_files import shipped_recipes
from prunekit.core.yaml_lines import read_yaml

GOOD = """\
schema: 1
model: {source: some-model}
steps:
  - remove: blocks
    by: {search: greedy}
    budget: {remove: 0.2, of: params}
"""

FULL = """\
schema: 1
name: full
description: everything
model: {source: m, revision: main, dtype: bfloat16, device: "cuda:1", trust_remote_code: true}
calibrate: {data: mine.txt, sequences: 3, length_tokens: 64, seed: 7}
steps:
  - remove: sublayers
    by: {search: greedy, distance: kl, front: 0}
    budget: {remove: 0.25, of: latency_ms, protect: [blocks.0.*]}
  - remove: neurons
    by: {score: norm, power: 2, names: [up, gate]}
    budget: {units: 64, multiple_of: 32, min_keep: 8}
evaluate:
  perplexity: wikitext2_eval
  embedding: {sequences: 5}
  latency: {batch: 2}
  sample: {prompt: Once}
export: {formats: [safetensors, onnx], layout: stock, max_shard_bytes: 1_000_000}
expect: {params_max: 1.10e8, perplexity_max: 60, onnx_max_abs_diff: 1e-3, loads_stock: true}
"""


def test_least_recipe_takes_the_defaults(write) -> None:
    recipe = load_recipe(write(GOOD))
    assert (recipe.calibrate.data, recipe.calibrate.sequences, recipe.calibrate.length_tokens) == ("wikitext2", 10, 256)
    assert recipe.model.dtype is None
    assert recipe.evaluate.perplexity is None
    assert recipe.export.formats == ("safetensors",)
    assert recipe.steps[0].by.knobs == {}


def test_full_recipe_keeps_every_value(write) -> None:
    recipe = load_recipe(write(FULL))
    assert recipe.model.device == "cuda:1"
    first, second = recipe.steps
    assert (first.by.role, first.by.name, first.by.search, first.by.score) == ("search", "greedy", "greedy", None)
    assert first.by.knobs == {"distance": "kl", "front": 0}
    assert first.budget.protect == ("blocks.0.*",)
    assert second.by.knobs["names"] == ["up", "gate"]
    assert recipe.evaluate.embedding.sequences == 5
    assert recipe.export.max_shard_bytes == 1_000_000
    assert recipe.expect.params_max == 110_000_000


def test_bare_text_names_the_evaluation_data(write) -> None:
    recipe = load_recipe(write(GOOD + "evaluate: {perplexity: mine.txt, embedding: other.txt}\n"))
    assert recipe.evaluate.perplexity.data == "mine.txt"
    assert recipe.evaluate.perplexity.length_tokens == 512
    assert recipe.evaluate.embedding.data == "other.txt"


def test_widths_compete_inside_their_group_and_layers_in_the_model(write) -> None:
    recipe = load_recipe(write(FULL))
    assert [step.budget.within for step in recipe.steps] == ["model", "group"]


def test_recipe_cannot_be_changed(write) -> None:
    recipe = load_recipe(write(GOOD))
    with pytest.raises(ValidationError):
        recipe.calibrate.sequences = 3


def test_effective_recipe_spells_out_method_defaults(write) -> None:
    by = load_recipe(write(GOOD)).effective()["steps"][0]["by"]
    assert by == {"search": "greedy", "distance": "js", "front": 0.4}


@pytest.mark.parametrize("text", [GOOD, FULL], ids=["least", "full"])
def test_effective_recipe_read_again_is_the_same(write, text) -> None:
    effective = load_recipe(write(text)).effective()
    again = parse_recipe(effective)
    assert again.effective() == effective
    assert again.steps[0].budget == load_recipe(write(text)).steps[0].budget


@pytest.mark.parametrize(
    ("expression", "read", "value"),
    [
        ("steps.0.budget.remove=0.25", lambda r: r.steps[0].budget.remove, 0.25),
        ("steps.0.by.distance=kl", lambda r: r.steps[0].by.knobs["distance"], "kl"),
        ("steps.0.by={score: norm, power: 1}", lambda r: r.steps[0].by.score, "norm"),
        ("export.formats=[safetensors,onnx]", lambda r: r.export.formats, ("safetensors", "onnx")),
        ("evaluate.latency.batch=3", lambda r: r.evaluate.latency.batch, 3),
        ("expect.params_max=1e8", lambda r: r.expect.params_max, 1e8),
        ("name=a=b", lambda r: r.name, "a=b"),
        ("model.revision=null", lambda r: r.model.revision, None),
    ],
)
def test_override_changes_one_value(write, expression, read, value) -> None:
    assert read(load_recipe(write(GOOD), [expression])) == value


def test_override_reaches_into_a_bare_text(write) -> None:
    text = GOOD + "evaluate: {perplexity: mine.txt}\n"
    perplexity = load_recipe(write(text), ["evaluate.perplexity.sequences=4"]).evaluate.perplexity
    assert (perplexity.data, perplexity.sequences) == ("mine.txt", 4)


def test_overrides_switch_the_budget_to_a_count(write) -> None:
    overrides = ["steps.0.budget.remove=null", "steps.0.budget.units=3", "steps.0.budget.of=units"]
    assert load_recipe(write(GOOD), overrides).steps[0].budget.units == 3


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("steps.0.budget.remove", "is not path=value"),
        ("=1", "is not path=value"),
        ("steps..by=1", "is not path=value"),
        ("steps.1.remove=blocks", "there is no `steps.1`"),
        ("steps.x.remove=blocks", "there is no `steps.x`"),
        ("model.source.x=1", "goes through `model.source`"),
        ("name=[1", "cannot be read"),
    ],
)
def test_override_that_leads_nowhere_is_refused(write, expression, words) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(write(GOOD), [expression])
    assert words in caught.value.what


def test_parse_leaves_the_callers_data_alone() -> None:
    data = read_yaml(GOOD).data
    parse_recipe(data, ["steps.0.budget.remove=0.5"])
    assert data == read_yaml(GOOD).data


def test_shipped_recipe_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    monkeypatch.setattr(recipe_files, "shipped_folder", lambda: tmp_path)
    assert load_recipe("mine").model.source == "some-model"
    with pytest.raises(RecipeError) as caught:
        load_recipe("mien")
    assert "`mine`" in caught.value.hint


def test_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "mine.yaml").write_text(GOOD)
    (tmp_path / "mine").write_text(GOOD.replace("some-model", "local"))
    monkeypatch.setattr(recipe_files, "shipped_folder", lambda: tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine").model.source == "local"


def test_names_of_shipped_recipes_say_what_their_files_say() -> None:
    shipped = shipped_recipes()
    assert "smollm2-demo" in shipped
    for name, path in shipped.items():
        data = read_yaml(path.read_text(encoding="utf-8")).data
        assert data["name"] == name
        assert data["description"]
