"""Folders that onnxruntime-genai opens and generates from as torch does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunekit.export.genai import export_genai
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.served import PROMPTS, genai_run, torch_run

genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
pytestmark = pytest.mark.slow
HOLES = ["blocks.0.attention", "blocks.2.ffn"]
UNEVEN = {"blocks.1.ffn.neurons": range(5, 25), "blocks.2.attention.kv_groups": (1,)}


@pytest.mark.parametrize(
    ("family", "drop", "keep", "type", "kv_heads"),
    [
        ("llama", HOLES, UNEVEN, "llama", (2, 1, 2)),
        ("gpt2-ids", ["blocks.1.ffn", "blocks.2.attention"], {}, "llama", (4, 4, 4)),
        ("qwen3", [], {}, "qwen3", (2, 2, 2, 2)),
    ],
)
def test_cut_decoders_agree_with_torch(
    small: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    drop: list[str],
    keep: dict[str, Any],
    type: str,
    kv_heads: tuple[int, ...],
) -> None:
    view = ModelView.open(small(family))
    (tmp_path / "cut").mkdir()
    engine.apply(view, Plan.make(view, drop, keep), tmp_path / "cut")
    report = export_genai(tmp_path / "cut", tmp_path / "genai")
    assert (report.type, report.kv_heads) == (type, kv_heads)
    decoder = json.loads((tmp_path / "genai" / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["num_hidden_layers"] == len(kv_heads)
    expected = torch_run(tmp_path / "cut", 12)
    found = genai_run(tmp_path / "genai", [ids for ids, _, _ in expected], 12)
    assert found == [tokens for _, _, tokens in expected]
    tokenizer = genai.Tokenizer(genai.Model(str(tmp_path / "genai")))
    assert [list(tokenizer.encode(prompt)) for prompt in PROMPTS] == [ids for ids, _, _ in expected]
