"""Masked copies: the source's shapes, the cut model's outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit.core.errors import ExportError, PlanError
from prunekit.export.masked import Cut, export_masked, open_cut
from prunekit.modeling.load import load_model
from prunekit.plan.layout import choose_layout
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.tiny import BLOCKS, tiny_inputs, write_tiny

BLOCK_1 = ["blocks.1.attention", "blocks.1.ffn"]
PAIR = ["blocks.1.ffn", "blocks.2.attention"]
EVERYWHERE = {f"blocks.{i}.ffn.neurons": range(3, 20) for i in range(BLOCKS)}


def cut(folder: Path, drop: Any, keep: Any) -> Cut:
    view = ModelView.open(folder / "dense")
    plan = Plan.make(view, drop, keep)
    (folder / "cut").mkdir()
    layout = engine.apply(view, plan, folder / "cut")
    return Cut(view, plan, layout, folder / "cut")


@pytest.mark.parametrize(
    ("family", "drop", "keep"),
    [
        ("llama", BLOCK_1, EVERYWHERE | {"blocks.1.ffn.neurons": None}),
        ("llama", PAIR, {}),
        ("qwen3", ["blocks.0.attention"], {"blocks.2.attention.kv_groups": (1,), "blocks.3.ffn.neurons": (5, 7)}),
        ("gpt2", ["blocks.3.ffn"], {"blocks.0.attention.kv_groups": (0, 3)}),
        ("gemma2", ["blocks.2.ffn"], {}),
        ("phi3", [], {"blocks.1.attention.kv_groups": (1,), "blocks.1.ffn.neurons": range(9)}),
        ("gpt_neox", ["blocks.1.attention"], {}),
        ("bert", [], EVERYWHERE),
        ("vit", ["blocks.0.ffn"], {}),
    ],
)
def test_masked_model_computes_what_the_cut_one_does(tmp_path: Path, family: str, drop: Any, keep: Any) -> None:
    write_tiny(family, tmp_path / "dense")
    made = cut(tmp_path, drop, {address: kept for address, kept in keep.items() if kept is not None})
    report = export_masked(made, tmp_path / "masked")
    assert "saves nothing" in report.saves
    dense = ModelView.open(tmp_path / "dense")
    masked = ModelView.open(tmp_path / "masked")
    assert {n: i.shape for n, i in masked.checkpoint.tensors.items()} == {
        n: i.shape for n, i in dense.checkpoint.tensors.items()
    }
    inputs = tiny_inputs(family)
    outputs = []
    for name in ("dense", "cut", "masked"):
        model = load_model(tmp_path / name)
        with torch.no_grad():
            outputs.append(model(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()})[0])
    scale = outputs[1].abs().max()
    assert (outputs[1] - outputs[2]).abs().max() < 1e-5 * scale
    assert (outputs[0] - outputs[2]).abs().max() > 1e-3 * scale
    assert "saves nothing" in (tmp_path / "masked" / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "drop", "keep", "words"),
    [
        ("bert", ["blocks.1.ffn"], {}, "masked sub-layers"),
        ("mixtral", [], {"blocks.1.ffn.experts": (0, 1, 2)}, "blocks.1.ffn.experts"),
        ("llama", [], {"hidden": (0, 1, 2, 3)}, "hidden channels"),
    ],
)
def test_what_zeros_cannot_say_is_refused(tmp_path: Path, family: str, drop: Any, keep: Any, words: str) -> None:
    write_tiny(family, tmp_path / "dense")
    with pytest.raises(PlanError, match=words):
        export_masked(cut(tmp_path, drop, keep), tmp_path / "masked")
    assert not (tmp_path / "masked").exists()


def test_manifest_says_what_was_cut(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "dense")
    made = cut(tmp_path, PAIR, {})
    recipe = {"model": {"source": str(tmp_path / "dense")}}
    manifest = {"plan": made.plan.to_json(), "layout": made.layout.kind, "recipe": recipe}
    (made.folder / "prunekit.json").write_text(json.dumps(manifest))
    again = open_cut(made.folder)
    assert (again.plan.drop, again.layout) == (made.plan.drop, choose_layout(made.dense, made.plan))
    with pytest.raises(ExportError, match="not found") as caught:
        open_cut(made.folder, str(tmp_path / "nowhere"))
    assert "--source" in caught.value.hint
    write_tiny("llama", tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(PlanError, match="another model"):
        open_cut(made.folder, str(tmp_path / "other"))
