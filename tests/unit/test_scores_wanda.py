"""Wanda on numbers worked by hand, and on real models against what a forward pass gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit.calibrate.collect import collect
from prunekit.calibrate.stack import Stack
from prunekit.core.errors import StructureError
from prunekit.modeling.load import load_model
from prunekit.modeling.modeling_prunekit import blocks_of
from prunekit.scores._weights import CheckpointWeights
from prunekit.scores.wanda import Wanda
from prunekit.structure.parts import Group, TensorRef
from prunekit.structure.view import ModelView
from tests.tiny import HEAD, tiny_inputs, write_tiny

# Output projections of attention and FFN; whether they store [in, out].
PLACES = {
    "llama": ("self_attn.o_proj", "mlp.down_proj", False),
    "gpt2": ("attn.c_proj", "mlp.c_proj", True),
    "bert": ("attention.output.dense", "output.dense", False),
    "vit": ("attention.o_proj", "mlp.fc2", False),
}


@pytest.mark.parametrize("stored_in_out", [False, True])
def test_a_column_times_its_input(stored_in_out: bool) -> None:
    columns = torch.tensor([[3.0, -4.0], [1.0, 1.0]])
    layout = (("ffn",), ("hidden",)) if stored_in_out else (("hidden",), ("ffn",))
    ref = TensorRef("w", "F32", (2, 2), layout)
    units = ("blocks.0.ffn.neurons.0", "blocks.0.ffn.neurons.1")
    group = Group("neurons", "blocks.0.ffn.neurons", units, ((ref,),), "ffn", {"ffn": 2, "hidden": 2}, ref)
    stats = {"projection/square/blocks.0.ffn": torch.tensor([4.0, 9.0])}
    found = Wanda().score(group, lambda name: columns if stored_in_out else columns.T, stats)
    assert found.tolist() == [7.0, 3.0]


@pytest.mark.parametrize("family", list(PLACES))
def test_score_is_that_of_the_inputs_a_forward_pass_gives(family: str, tmp_path: Path) -> None:
    view = ModelView.open(write_tiny(family, tmp_path / "m"))
    model, inputs = load_model(view.checkpoint.folder, "float64"), tiny_inputs(family)
    stats = collect(Stack(model), inputs, Wanda.needs)
    attention, ffn, stored_in_out = PLACES[family]
    for kind, place, width in (("neurons", ffn, 1), ("kv_groups", attention, 0)):
        entering = inputs_of(model, place, inputs)
        for group, matrix, rows in zip(view.groups(kind), weights_of(model, place), entering, strict=True):
            columns = (matrix if stored_in_out else matrix.T).abs() * rows.square().mean(0).sqrt()[:, None]
            size = width or columns.shape[0] // len(group.units)
            assert size in (1, HEAD, 2 * HEAD)
            expected = columns.reshape(len(group.units), -1).mean(1)
            found = Wanda().score(group, CheckpointWeights(view.checkpoint), stats)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def weights_of(model: Any, place: str) -> list[Tensor]:
    return [block.get_submodule(place).weight.detach() for block in blocks_of(model)]


def inputs_of(model: Any, place: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What enters a layer of each block in a plain forward pass [tokens, width]."""
    found: list[Tensor] = []
    hooks = [
        block.get_submodule(place).register_forward_pre_hook(lambda _, given: found.append(given[0].flatten(0, -2)))
        for block in blocks_of(model)
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def test_experts_have_no_projection_to_score(tmp_path: Path) -> None:
    group = ModelView.open(write_tiny("mixtral", tmp_path)).groups("neurons")[0]
    with pytest.raises(StructureError, match="no single output projection") as caught:
        Wanda().score(group, lambda name: torch.zeros(()), {})
    assert "magnitude" in caught.value.hint
