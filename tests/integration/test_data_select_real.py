"""A recipe on SmolLM2-135M that calibrates and heals on what a metric keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from prunekit.cli.main import main

RECIPE = {
    "schema": 1,
    "model": {"source": "smollm2-135m-instruct"},
    "calibrate": {"sequences": 2, "length_tokens": 32, "select": {"metric": "loss", "keep": 0.5, "rule": "auto"}},
    "steps": [{"remove": "blocks", "by": {"score": "block_influence"}, "budget": {"units": 2}}],
    "heal": {
        "method": "distill", "data": "wikitext2", "steps": 2, "sequences": 4, "length_tokens": 32, "batch": 2,
        "select": {"metric": "perplexity", "keep": 0.25, "rule": "hard"},
    },
}  # fmt: skip


@pytest.mark.slow
def test_recipe_calibrates_and_heals_on_what_a_metric_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(RECIPE))
    assert main(["prune", "--recipe", str(file), "--output", str(out)]) == 0
    said = capsys.readouterr().err
    assert "2 of 4 sequences stay, the easy ones by loss: " in said
    assert "kept tokens a parameter, under 20" in said
    assert "4 of 16 sequences stay, the hard ones by perplexity: asked for" in said
    manifest = json.loads((out / "prunekit.json").read_text())
    assert manifest["recipe"]["heal"]["select"] == {"metric": "perplexity", "keep": 0.25, "rule": "hard"}
