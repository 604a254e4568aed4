"""The model card: metadata the hub reads, how to load, what went."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunekit.report.card import CardFacts, card_facts, metadata, model_card, read_inherited, read_metadata
from prunekit.report.run import Run
from prunekit.report.table import lines
from tests.runs import manifest, old_manifest

FACTS = CardFacts(
    title="smollm2-135m-instruct, 12 of 60 sub-layers removed",
    source="smollm2-135m-instruct",
    auto_class="AutoModelForCausalLM",
    layout="stock",
    removed=["removed attention: 12, 14-16"],
    measured=lines({"params": 134_515_008}, {"params": 113_276_160}),
    recipe="schema: 1\nmodel: {source: smollm2-135m-instruct}\n",
    versions={"prunekit": "0.1.0", "torch": "2.13.0"},
    layer_map="layer_map.png",
)


def front_matter(text: str) -> dict[str, Any]:
    _, block, _ = text.split("---\n", 2)
    return yaml.safe_load(block)


def test_packaged_model_names_its_base_model_and_licence() -> None:
    block = front_matter(model_card(FACTS))
    assert block["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert block["license"] == "apache-2.0"
    assert block["library_name"] == "transformers"
    assert "pruning" in block["tags"]


def test_hub_id_is_the_base_model_and_unknown_licence_is_left_out() -> None:
    block = metadata(replace(FACTS, source="org/model-7b"))
    assert block["base_model"] == "org/model-7b"
    assert "license" not in block


@pytest.mark.parametrize("source", ["/models/mine", "./mine", "../a/b", "mine.gguf"])
def test_local_path_is_no_base_model(source: str) -> None:
    assert "base_model" not in metadata(replace(FACTS, source=source))


def test_existing_relative_folder_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in metadata(replace(FACTS, source="models/mine"))


def test_source_card_passes_on_licence_and_task(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\npipeline_tag: text-generation\ntags: [x]\n---\n# hi\n")
    block = metadata(replace(FACTS, source=str(tmp_path), source_card=read_metadata(tmp_path)))
    assert (block["license"], block["pipeline_tag"]) == ("mit", "text-generation")
    assert "x" not in block["tags"]


@pytest.mark.parametrize("text", ["# no block\n", "---\n: : [\n---\n", "---\n- a\n---\n", ""])
def test_unreadable_source_card_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_metadata(tmp_path) == {}


def test_stock_layout_loads_without_custom_code() -> None:
    text = model_card(FACTS)
    assert "trust_remote_code" not in text
    assert "import prunekit" not in text


def test_heterogeneous_layout_shows_both_ways_in() -> None:
    text = model_card(replace(FACTS, layout="heterogeneous"))
    assert "import prunekit\nfrom transformers import AutoModelForCausalLM" in text
    assert "trust_remote_code=True" in text
    assert "custom_code" in front_matter(text)["tags"]


def test_card_shows_map_table_recipe_and_versions() -> None:
    text = model_card(FACTS)
    assert "(layer_map.png)" in text
    assert "| parameters | M | 134.5 | 113.3 | -15.8 |" in text
    assert "model: {source: smollm2-135m-instruct}" in text
    assert "prunekit 0.1.0, torch 2.13.0" in text


def test_sample_cannot_close_its_fence() -> None:
    text = model_card(replace(FACTS, prompt="Write code", samples={"dense": "```\nx = 1\n```\n# not a heading"}))
    assert "````text\n```\nx = 1" in text


def test_hub_reads_the_card_back(tmp_path: Path) -> None:
    """The hub's own parser finds base model, licence, task, tags and the measured result."""
    from huggingface_hub import ModelCard

    data = manifest()
    data["source"]["card"] = {"license": "mit", "language": ["en", "de"]}
    data["recipe"]["model"]["source"] = "smollm2-135m-instruct"
    run = Run.model_validate(data)
    (tmp_path / "README.md").write_text(model_card(card_facts(run, "AutoModelForCausalLM", "map.png", "report.html")))
    card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    found = card.data
    assert (found.base_model, found.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "mit")
    assert (found.pipeline_tag, found.library_name, found.language) == ("text-generation", "transformers", ["en", "de"])
    assert {"prunekit", "pruning", "custom_code"} <= set(found.tags)
    (result,) = found.eval_results
    assert (result.task_type, result.dataset_name) == ("text-generation", "wikitext2_eval")
    assert (result.metric_type, result.metric_value) == ("perplexity", 43.7)
    assert result.metric_name == "Perplexity, 8 windows of 128 tokens"
    assert card.text.lstrip().startswith("# a run")


@pytest.mark.parametrize("perplexity", [None, float("inf")])
def test_no_result_that_is_no_number(perplexity: float | None) -> None:
    data = manifest()
    data["after"]["perplexity"] = perplexity
    assert "model-index" not in metadata(card_facts(Run.model_validate(data), "AutoModelForCausalLM"))


def test_card_of_an_older_folder() -> None:
    assert "## What was removed" in model_card(card_facts(Run.model_validate(old_manifest()), "AutoModel"))


def test_only_what_holds_for_the_result_is_inherited(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags: [x]\ndate: 2020-01-01\n---\n")
    assert read_inherited(tmp_path) == {"license": "mit", "language": ["en"]}
