"""Recipes from start to end on small encoders of every family: data, scores, search, cut, likeness to dense."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

import prunekit.pipeline.carry_out as carry_out
from prunekit import pipeline
from prunekit.core.recipe import parse_recipe
from prunekit.export.verify import VerifyReport
from tests.tiny import BLOCKS, DECODERS, FAMILIES, IMAGE_MODELS

# Families whose blocks have names or a course of their own; the others' are built as one of these.
DISTINCT = ("mpnet", "modernbert", "dinov2", "videomae")
ENCODERS = [
    pytest.param(family, marks=() if family in DISTINCT else pytest.mark.slow)
    for family in FAMILIES
    if family not in DECODERS
]


@pytest.mark.parametrize("family", ENCODERS)
def test_scores_search_and_likeness(
    family: str, small: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The two fresh processes have tests of their own.
    monkeypatch.setattr(carry_out, "_verified", lambda *arguments: VerifyReport(Path(), ()))
    data = "noise" if family in IMAGE_MODELS else "wikitext2"
    steps = [
        {"remove": "blocks", "by": {"score": "block_influence"}, "budget": {"units": 1}},
        {"remove": "blocks", "by": {"score": "angular"}, "budget": {"units": 1}},
        {"remove": "ffn", "by": {"search": "finercut", "distance": "angular"}, "budget": {"units": 1}},
        {"remove": "attention", "by": {"search": "finercut", "distance": "norm"}, "budget": {"units": 1}},
        {"remove": "neurons", "by": {"score": "magnitude"}, "budget": {"remove": 0.2}},
        {"remove": "kv_groups", "by": {"score": "magnitude"}, "budget": {"remove": 0.25}},
    ]
    recipe = {
        "schema": 1,
        "model": {"source": str(small(family))},
        "calibrate": {"data": data, "sequences": 3, "length_tokens": 16},
        "steps": steps,
        "evaluate": {
            "embedding": {"data": data, "sequences": 3, "length_tokens": 16},
            "latency": {"prompt_tokens": 4, "repeats": 1},
        },
    }
    pipeline.run(parse_recipe(recipe), tmp_path / "o")
    manifest = json.loads((tmp_path / "o" / "prunekit.json").read_text())
    assert len(manifest["plan"]["drop"]) == 6
    assert len(manifest["plan"]["keep"]) == 2 * BLOCKS - 6
    assert 0 < manifest["after"]["flops_per_token"] < manifest["before"]["flops_per_token"]
    assert manifest["after"]["embedding_cosine"] < 1 - 1e-6
    assert all(math.isfinite(manifest["after"][name]) for name in ("embedding_cosine", "prefill_tokens_s"))
