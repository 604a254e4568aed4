"""The readable part of an output folder, and what a run prints."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prunekit.modeling.families import auto_class
from prunekit.report.facts import facts_table
from prunekit.report.folder import write_report
from prunekit.report.layer_map import Cell, Row
from prunekit.report.outcome import outcome
from tests.runs import manifest, write_run


def printed(renderable: Any) -> str:
    console = Console(file=StringIO(), width=100, color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_folder_gets_card_map_and_report_from_its_manifest(tmp_path: Path) -> None:
    data = manifest()
    data["source"]["card"] = {"license": "mit"}
    write_report(write_run(tmp_path, data))
    card = (tmp_path / "README.md").read_text()
    names = {"README.md", "config.json", "layer_map.png", "prunekit.json", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "license: mit" in card
    assert "removed ffn: 7, 9" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "there was a dog" in card
    assert "(report.html)" in card


def test_title_is_no_formula(tmp_path: Path) -> None:
    data = manifest()
    data["recipe"]["name"] = "costs $x_{ and $"
    write_report(write_run(tmp_path, data))
    assert (tmp_path / "layer_map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("BertModel", "AutoModel"),
        ("ViTForImageClassification", "AutoModelForImageClassification"),
    ],
)
def test_auto_class_of_an_architecture(architecture: str, expected: str) -> None:
    assert auto_class([architecture]) == expected


def test_no_architecture_loads_as_the_plain_model() -> None:
    assert auto_class([]) == "AutoModel"


def test_outcome_shows_text_of_a_model_as_it_is() -> None:
    rows = [Row(0, Cell("kept", {}), Cell("removed", {}))]
    text = printed(outcome(rows, {"sample": "[red]a[/nothing]"}, {"sample": "b"}, {}))
    assert "[red]a[/nothing]" in text


def test_outcome_marks_a_missed_expectation() -> None:
    rows = [Row(0, Cell("kept", {}), Cell("removed", {}))]
    entries = [
        {"name": "params_max", "limit": 100, "value": 90, "ok": True},
        {"name": "perplexity_max", "limit": 20.0, "value": 25.5, "ok": False},
    ]
    lines = printed(outcome(rows, {}, {}, {}, entries)).splitlines()
    assert lines[-2].split() == ["params_max", "100", "90", "met"]
    assert lines[-1].split() == ["perplexity_max", "20", "25.5", "missed"]


def test_facts_name_nested_values_and_skip_empty_ones() -> None:
    text = printed(facts_table({"ok": True, "checks": [{"name": "a", "diff": 1.5e-6}], "gone": None, "ids": [1, 2]}))
    shown = [" ".join(line.split()) for line in text.splitlines()]
    assert shown == ["ok yes", "checks.0.name a", "checks.0.diff 1.5e-06", "ids 1, 2"]
