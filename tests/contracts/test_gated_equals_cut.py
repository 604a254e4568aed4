"""A model whose gates are fixed computes what the cut model with folded factors computes, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.files import atomic_folder
from prunekit.gates._fold import folded, plan_of
from prunekit.gates.shrp import Shrp
from prunekit.heal._weights import names_of
from prunekit.modeling.load import load_model
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.gating import cut_by, gated, task_of
from tests.tiny import tiny_inputs, write_tiny

# Of outputs around 1, after a few products in another order.
TOLERANCE = 2e-5
CASES = {
    "llama, all": ("sublayers", "neurons", "kv_groups", "query_heads", "hidden"),
    "qwen3, all": ("sublayers", "neurons", "kv_groups", "hidden"),
    "gpt2, all": ("sublayers", "neurons", "kv_groups", "hidden"),
    "bert, all": ("sublayers", "neurons", "kv_groups", "hidden"),
    "roberta, all": ("neurons", "kv_groups", "hidden"),
    "mistral, all": ("neurons", "hidden"),
    "llama": ("neurons", "kv_groups", "query_heads", "sublayers"),
    "qwen3": ("neurons", "kv_groups", "sublayers"),
    "phi3": ("neurons", "query_heads", "sublayers"),
    "gpt2": ("neurons", "kv_groups", "sublayers"),
    "bert": ("neurons", "kv_groups", "sublayers"),
    "roberta": ("ffn", "kv_groups"),
    "distilbert": ("neurons", "kv_groups"),
    "gemma2": ("neurons", "kv_groups"),
}


def outputs(model: Any, family: str) -> torch.Tensor:
    inputs = tiny_inputs(family)
    with torch.no_grad():
        return model(**{name: v.float() if v.is_floating_point() else v for name, v in inputs.items()})[0]


@pytest.mark.parametrize("case", CASES)
def test_gated_equals_cut(case: str, tmp_path: Path) -> None:
    family = case.partition(",")[0]
    folder = write_tiny(family, tmp_path / "dense")
    view = ModelView.open(folder)
    task = task_of(view, CASES[case])
    model, gates, names = gated(folder, task)
    plan, tensors = cut_by(folder, task, model, gates, names)
    assert plan.drop or plan.keep
    with atomic_folder(tmp_path / "cut") as target:
        engine.apply(view, plan, target, replaced=tensors)
    found, expected = outputs(load_model(tmp_path / "cut", "float32"), family), outputs(model, family)
    stays = list(plan.keep.get("hidden", range(view.hidden)))
    if expected.shape[-1] == view.hidden:
        expected = expected[..., stays]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    dense = outputs(load_model(folder, "float32"), family)
    dense = dense[..., stays] if dense.shape[-1] == view.hidden else dense
    assert float((found - dense).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet", "electra", "modernbert"])
def test_routed_equals_cut(family: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path / "dense")
    view = ModelView.open(folder)
    task = task_of(view, ("kv_groups",), remove=0.2)
    model = load_model(folder, "float32")
    names = names_of(model, Checkpoint.open(folder))
    gates = Shrp(top=2, expander="shared").gates(task)
    gates.attach(model, view)
    gates.usage.copy_(torch.randint(0, 9, gates.usage.shape, generator=torch.Generator().manual_seed(0)).float())
    expected = outputs(model.eval(), family)
    assert gates.chosen is not None
    plan = plan_of(task, gates.chosen.keep)
    gates.settle()
    tensors = folded(model, names, task, gates.fixed(), plan, Checkpoint.open(folder), True)
    with atomic_folder(tmp_path / "cut") as target:
        engine.apply(view, plan, target, replaced=tensors)
    torch.testing.assert_close(outputs(load_model(tmp_path / "cut"), family), expected, atol=TOLERANCE, rtol=0)
    assert float((outputs(load_model(folder), family) - expected).abs().max()) > 100 * TOLERANCE
