"""Recipes that ask for served formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunekit.core.errors import PlanError, PrunekitError
from prunekit.core.recipe import Recipe, parse_recipe
from prunekit.export.verify import verify
from prunekit.pipeline import carry_out
from tests.tiny import write_tiny


def recipe(folder: Path, formats: list[str], **step: Any) -> Recipe:
    asked = {"remove": "sublayers", "by": {"score": "random", "seed": 3}, "budget": {"units": 2}, **step}
    data = {"schema": 1, "model": {"source": str(folder)}, "steps": [asked]}
    return parse_recipe({**data, "export": {"formats": ["safetensors", *formats], "gguf_type": "f16"}})


@pytest.mark.parametrize(
    ("family", "format", "words"),
    [
        ("bert", "gguf", "is not written as GGUF"),
        ("gemma2", "deci", "cannot be DeciLM"),
        ("bert", "genai", "no decoder"),
    ],
)
def test_family_is_refused_before_a_method_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, format: str, words: str
) -> None:
    monkeypatch.setattr("prunekit.pipeline.carry_out.make_plan", None)
    with pytest.raises(PrunekitError, match=words):
        carry_out.run(recipe(write_tiny(family, tmp_path / "m"), [format]), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_plan_is_refused_before_the_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny("llama", tmp_path / "m", intermediate_size=512)
    monkeypatch.setattr("prunekit.pipeline.carry_out._finish", None)
    step = {"remove": "neurons", "budget": {"remove": 0.3}}
    with pytest.raises(PlanError, match="cannot be DeciLM") as caught:
        carry_out.run(recipe(folder, ["deci"], **step), tmp_path / "out")
    assert "multiples of 256" in caught.value.why
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.slow
def test_every_format_lies_in_a_folder_of_its_name(small: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    carry_out.run(recipe(small("llama-256"), ["gguf", "deci", "masked"]), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "prunekit.json").read_text())
    assert set(manifest["exports"]) == {"gguf", "deci", "masked"}
    assert manifest["exports"]["gguf"]["type"] == "f16"
    assert (tmp_path / "out" / "gguf" / "model-f16.gguf").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`masked/`: original shapes with zeros; saves nothing" in card
    for name in ("deci", "masked"):
        checked = verify(tmp_path / "out" / name, tmp_path / "out")
        assert checked.ok, checked.problems
