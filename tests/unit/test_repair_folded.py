"""Mean bias and linear patch: exact where what was removed is a constant or a linear map, refused where none can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit.calibrate.stack import Stack
from prunekit.core.errors import PlanError
from prunekit.core.registry import REPAIRS
from prunekit.modeling.modeling_prunekit import blocks_of, bypass, output_projection
from prunekit.repair.linear_patch import LinearPatch
from prunekit.repair.mean_bias import MeanBias
from prunekit.structure.view import ModelView
from tests.tiny import FFN, HEAD, HEADS, HIDDEN, tiny_inputs, tiny_model, write_tiny

# New weights come back as float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
DATA = {"batch": 8, "length": 24}


def outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs)[0]
    return found


def layer(model: Any, address: str) -> Any:
    _, number, kind = address.split(".")
    return output_projection(blocks_of(model)[int(number)], kind)


def put(model: Any, repaired: Any, kept: dict[str, Tensor]) -> None:
    """Gives a model the repaired projections; channels that go are silenced."""
    for address, new in repaired.projections.items():
        module = layer(model, address)
        weight = module.weight.data.T if hasattr(module, "nf") else module.weight.data
        if address in kept:
            weight.zero_()
        weight[:, kept.get(address, torch.arange(weight.shape[1]))] = new.weight.to(weight)
        if new.bias is not None:
            module.bias.data.copy_(new.bias)


def without(*gone: int, width: int) -> Tensor:
    return torch.tensor([i for i in range(width) if i not in gone])


def constant_neurons(model: Any, family: str, neurons: list[int]) -> None:
    block = blocks_of(model)[1]
    if family == "gpt2":
        block.mlp.c_fc.weight.data[:, neurons] = 0
        block.mlp.c_fc.bias.data[neurons] = 1.5
    else:
        block.intermediate.dense.weight.data[neurons] = 0
        block.intermediate.dense.bias.data[neurons] = 1.5


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_constant_neurons_are_not_missed(family: str) -> None:
    model, inputs = tiny_model(family), tiny_inputs(family, **DATA)
    constant_neurons(model, family, [3, 7])
    dense = outputs(model, inputs)
    kept = {"blocks.1.ffn": without(3, 7, width=FFN)}
    repaired = MeanBias().fit(Stack(model), inputs, frozenset(), kept)
    assert repaired.projections["blocks.1.ffn"].weight.shape == (HIDDEN, FFN - 2)
    assert repaired.error < 1e-8
    put(model, repaired, kept)
    torch.testing.assert_close(outputs(model, inputs), dense, **CLOSE)


def test_a_head_that_always_says_the_same_is_not_missed() -> None:
    model, inputs = tiny_model("bert"), tiny_inputs("bert", **DATA)
    gone = list(range(HEAD, 2 * HEAD))
    value = blocks_of(model)[2].attention.self.value
    value.weight.data[gone] = 0
    value.bias.data[gone] = 2.0
    dense = outputs(model, inputs)
    kept = {"blocks.2.attention": without(*gone, width=HEADS * HEAD)}
    put(model, MeanBias().fit(Stack(model), inputs, frozenset(), kept), kept)
    torch.testing.assert_close(outputs(model, inputs), dense, **CLOSE)


def test_what_varies_is_met_on_average() -> None:
    """The mean of what the narrowed sub-layer adds is that of the dense one, and the weights that stay are its own."""
    model, inputs = tiny_model("gpt2"), tiny_inputs("gpt2", **DATA)
    kept = {"blocks.1.ffn": without(*range(12), width=FFN)}
    added = mean_added(model, inputs)
    repaired = MeanBias().fit(Stack(model), inputs, frozenset(), kept)
    mine = layer(model, "blocks.1.ffn").weight.data.T[:, kept["blocks.1.ffn"]].float()
    torch.testing.assert_close(repaired.projections["blocks.1.ffn"].weight, mine, rtol=0, atol=0)
    put(model, repaired, kept)
    torch.testing.assert_close(mean_added(model, inputs), added, **CLOSE)
    assert repaired.error > 0


def mean_added(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: list[Tensor] = []
    hook = layer(model, "blocks.1.ffn").register_forward_hook(lambda _, given, out: found.append(out))
    outputs(model, inputs)
    hook.remove()
    return found[0].flatten(0, -2).mean(0)


def linear_block(model: Any, matrix: Tensor) -> None:
    """Makes block 2 add a linear map of what the FFN of block 1 adds."""
    blocks, seen = blocks_of(model), []
    module = layer(model, "blocks.2.attention")
    module.weight.data.zero_()
    if module.bias is not None:
        module.bias.data.zero_()
    blocks[1].mlp.register_forward_hook(lambda _, given, out: seen.append(out))
    blocks[2].mlp.register_forward_hook(lambda _, given, out: seen[-1] @ matrix)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_that_is_a_linear_map_is_not_missed(family: str) -> None:
    model, inputs = tiny_model(family), tiny_inputs(family, **DATA)
    matrix = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(3)).to(model.dtype) * 0.3
    linear_block(model, matrix)
    dense = outputs(model, inputs)
    drop = frozenset({"blocks.2.attention", "blocks.2.ffn"})
    repaired = LinearPatch(ridge=1e-10).fit(Stack(model), inputs, drop, {})
    assert list(repaired.projections) == ["blocks.1.ffn"]
    module = layer(model, "blocks.1.ffn")
    weight = (module.weight.data.T if hasattr(module, "nf") else module.weight.data).clone()
    turned = torch.eye(HIDDEN).to(matrix) + matrix
    torch.testing.assert_close(
        repaired.projections["blocks.1.ffn"].weight.to(weight), turned.T @ weight, rtol=1e-3, atol=1e-3
    )
    assert repaired.error < 1e-8
    put(model, repaired, {})
    for kind in ("attention", "ffn"):
        bypass(blocks_of(model)[2], kind)
    torch.testing.assert_close(outputs(model, inputs), dense, **CLOSE)


def test_every_removed_run_is_patched_and_nothing_else() -> None:
    model, inputs = tiny_model("llama"), tiny_inputs("llama", **DATA)
    drop = frozenset({"blocks.1.attention", "blocks.3.ffn"})
    found = LinearPatch().fit(Stack(model), inputs, drop, {"blocks.2.ffn": torch.arange(10)}).projections
    assert list(found) == ["blocks.0.ffn", "blocks.3.attention"]


@pytest.mark.parametrize("seed", range(3))
def test_a_patched_model_is_nearer_to_the_dense_one(seed: int) -> None:
    inputs, drop = tiny_inputs("llama", batch=32, length=24, seed=seed), ("blocks.2.attention", "blocks.2.ffn")
    dense = outputs(tiny_model("llama", seed), inputs)
    raw, patched = tiny_model("llama", seed), tiny_model("llama", seed)
    put(patched, LinearPatch(ridge=0.01).fit(Stack(patched), inputs, frozenset(drop), {}), {})
    for model in (raw, patched):
        for address in drop:
            bypass(blocks_of(model)[2], address.rpartition(".")[2])
    far, near = ((outputs(model, inputs) - dense).square().mean() for model in (raw, patched))
    assert near < 0.95 * far


def test_a_strong_ridge_leaves_the_projection_as_it_was() -> None:
    model, inputs = tiny_model("llama"), tiny_inputs("llama", **DATA)
    found = LinearPatch(ridge=1e9).fit(Stack(model), inputs, frozenset({"blocks.1.attention"}), {}).projections
    weight = layer(model, "blocks.0.ffn").weight.data
    torch.testing.assert_close(found["blocks.0.ffn"].weight.to(weight), weight, **CLOSE)


def test_nothing_before_a_removed_run_is_refused() -> None:
    with pytest.raises(PlanError, match="nothing stands before") as caught:
        LinearPatch().fit(Stack(tiny_model("llama")), tiny_inputs("llama"), frozenset({"blocks.0.attention"}), {})
    assert "protect" in caught.value.hint


@pytest.mark.parametrize(
    ("method", "family", "kinds", "words"),
    [
        ("mean_bias", "qwen3", ["neurons"], "`blocks.0.ffn` has no bias"),
        ("mean_bias", "qwen2", ["blocks", "kv_groups"], "`blocks.0.attention` has no bias"),
        ("mean_bias", "gpt2", ["blocks"], "the steps remove blocks"),
        ("linear_patch", "llama", ["neurons", "neurons"], "the steps remove neurons,"),
        ("linear_patch", "bert", ["blocks"], "a norm follows each sum"),
        ("least_squares", "bert", ["blocks"], "a norm follows each sum"),
    ],
)
def test_a_family_or_a_cut_that_does_not_do_is_refused(
    tmp_path: Path, method: str, family: str, kinds: list[str], words: str
) -> None:
    view = ModelView.open(write_tiny(family, tmp_path / family))
    with pytest.raises(PlanError) as caught:
        REPAIRS.get(method).require(view, kinds)
    assert words in caught.value.why
    assert caught.value.hint


@pytest.mark.parametrize(
    ("method", "family", "kinds"),
    [("mean_bias", "bert", ["neurons", "query_heads"]), ("mean_bias", "gpt2", ["neurons", "blocks"]),
     ("linear_patch", "llama", ["sublayers", "neurons"])],
)  # fmt: skip
def test_a_family_that_does_is_taken(tmp_path: Path, method: str, family: str, kinds: list[str]) -> None:
    REPAIRS.get(method).require(ModelView.open(write_tiny(family, tmp_path / family)), kinds)
