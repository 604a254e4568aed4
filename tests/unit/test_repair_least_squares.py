"""Least squares against plain formulas, and on cuts that it can undo exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit.calibrate.stack import Stack
from prunekit.core.errors import PlanError
from prunekit.modeling.modeling_prunekit import blocks_of, bypass, output_projection
from prunekit.repair.least_squares import LeastSquares
from tests.tiny import FFN, HEAD, HIDDEN, tiny_inputs, tiny_model

# Blocks of pre-norm families whose sub-layers add the output of their last matrix.
FAMILIES = ("llama", "qwen3", "gpt2", "vit")
# Weights come back as float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs)[0]
    return found


def cut(model: Any, drop: set[str], repaired: Any = None, kept: dict[str, Tensor] | None = None) -> None:
    """Passes sub-layers over, silences channels, and puts repaired projections in."""
    for address in drop:
        _, number, kind = address.split(".")
        bypass(blocks_of(model)[int(number)], kind)
    for address, channels in (kept or {}).items():
        weight = matrix(model, address)
        gone = [c for c in range(weight.shape[1]) if c not in channels.tolist()]
        weight[:, gone] = 0
    for address, new in (repaired.projections if repaired else {}).items():
        channels = (kept or {}).get(address, torch.arange(matrix(model, address).shape[1]))
        matrix(model, address)[:, channels] = new.weight.double()
        if new.bias is not None:
            layer(model, address).bias.data.copy_(new.bias)


def layer(model: Any, address: str) -> Any:
    _, number, kind = address.split(".")
    return output_projection(blocks_of(model)[int(number)], kind)


def matrix(model: Any, address: str) -> Tensor:
    """Weight [hidden, width], a view."""
    found: Tensor = layer(model, address).weight.data
    return found.T if hasattr(layer(model, address), "nf") else found


def test_a_neuron_that_another_one_repeats_is_not_missed() -> None:
    model, inputs = tiny_model("llama"), tiny_inputs("llama", batch=8, length=24)
    mlp = blocks_of(model)[1].mlp
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight.data[7] = projection.weight.data[3]
    dense = outputs(model, inputs)
    kept = {"blocks.1.ffn": torch.tensor([n for n in range(FFN) if n != 7])}
    repaired = LeastSquares(ridge=1e-12).fit(Stack(model), inputs, frozenset(), kept)
    down = mlp.down_proj.weight.data.clone()
    cut(model, set(), repaired, kept)
    assert list(repaired.projections) == [
        "blocks.1.ffn",
        "blocks.2.attention",
        "blocks.2.ffn",
        "blocks.3.attention",
        "blocks.3.ffn",
    ]
    torch.testing.assert_close(mlp.down_proj.weight[:, 3], down[:, 3] + down[:, 7], **CLOSE)
    torch.testing.assert_close(outputs(model, inputs), dense, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_projection_is_the_plain_formula(family: str) -> None:
    """With one sub-layer gone, the one before it learns to add its part too; ridge regression written out."""
    model, inputs = tiny_model(family), tiny_inputs(family, batch=6)
    gone, ridge = "blocks.2.attention", 0.5
    x, before, target = recorded(model, inputs, 1, 2)
    repaired = LeastSquares(ridge=ridge).fit(Stack(model), inputs, frozenset({gone}), {})
    first = next(iter(repaired.projections))
    assert first == "blocks.1.ffn"
    weight, bias, wanted = matrix(model, first), layer(model, first).bias, target - before
    if bias is not None:
        x, wanted = x - x.mean(0), wanted - wanted.mean(0)
    hold = ridge * x.square().sum(0).mean()
    left = torch.cat([x, hold.sqrt() * torch.eye(FFN, dtype=x.dtype)])
    right = torch.cat([wanted, hold.sqrt() * weight.T])
    expected = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(repaired.projections[first].weight.double(), expected, **CLOSE)
    assert (repaired.projections[first].bias is None) == (bias is None)


def recorded(model: Any, inputs: dict[str, Tensor], block: int, gone: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input of a block's FFN output matrix, the stream before that FFN, and the stream behind the next attention."""
    found: dict[str, Tensor] = {}
    stack, address = Stack(model), f"blocks.{block}.ffn"
    state = stack.enter(inputs)
    hidden = state.hidden
    hook = layer(model, address).register_forward_pre_hook(lambda _, given: found.update(x=given[0]))
    for i, here in enumerate(stack.addresses):
        found["before"] = hidden if here == address else found.get("before", hidden)
        hidden = stack.run(i, hidden, state)
        if here == f"blocks.{gone}.attention":
            break
    hook.remove()
    return found["x"].flatten(0, -2), found["before"].flatten(0, -2), hidden.flatten(0, -2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_outputs_come_nearer_to_the_dense_model(family: str, seed: int) -> None:
    inputs = tiny_inputs(family, batch=64, length=24, seed=seed)
    drop, kept = {"blocks.1.attention", "blocks.2.ffn"}, {"blocks.3.attention": torch.arange(2 * HEAD, 4 * HEAD)}
    dense = outputs(tiny_model(family, seed), inputs)
    raw, mended = tiny_model(family, seed), tiny_model(family, seed)
    repaired = LeastSquares(ridge=0.01).fit(Stack(mended), inputs, frozenset(drop), kept)
    cut(raw, drop, None, kept)
    cut(mended, drop, repaired, kept)
    far, near = ((outputs(model, inputs) - dense).square().mean() for model in (raw, mended))
    assert near < 0.8 * far
    assert 0 < repaired.error < 1


def test_what_stays_before_the_first_cut_is_left_alone() -> None:
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    repaired = LeastSquares().fit(Stack(model), inputs, frozenset({"blocks.3.ffn"}), {})
    assert list(repaired.projections) == ["blocks.3.attention"]
    assert LeastSquares().fit(Stack(model), inputs, frozenset(), {}).projections == {}


def test_a_missing_first_sublayer_is_made_up_for_by_those_behind_it() -> None:
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    repaired = LeastSquares().fit(Stack(model), inputs, frozenset({"blocks.0.attention", "blocks.0.ffn"}), {})
    assert next(iter(repaired.projections)) == "blocks.1.attention"
    assert len(repaired.projections) == 6


def test_padding_does_not_count() -> None:
    model, inputs = tiny_model("llama"), tiny_inputs("llama", batch=4)
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, :3] = 0
    other = inputs["input_ids"].clone()
    other[:, :3] = 5
    drop = frozenset({"blocks.1.attention"})
    first = LeastSquares().fit(Stack(model), {**inputs, "attention_mask": mask}, drop, {})
    second = LeastSquares().fit(Stack(model), {"input_ids": other, "attention_mask": mask}, drop, {})
    for address, new in first.projections.items():
        torch.testing.assert_close(new.weight, second.projections[address].weight)


def test_parts_of_the_data_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit.repair import _fit

    model, inputs = tiny_model("gpt2"), tiny_inputs("gpt2", batch=5)
    drop = frozenset({"blocks.1.ffn"})
    whole = LeastSquares().fit(Stack(model), inputs, drop, {})
    monkeypatch.setattr(_fit, "_TOKENS", 18)
    parts = LeastSquares().fit(Stack(model), inputs, drop, {})
    for address, new in whole.projections.items():
        torch.testing.assert_close(new.weight, parts.projections[address].weight, rtol=1e-4, atol=1e-5)
    assert whole.error == pytest.approx(parts.error, rel=1e-3)


def test_a_norm_behind_the_sum_is_refused() -> None:
    with pytest.raises(PlanError, match="cannot be repaired"):
        LeastSquares().fit(Stack(tiny_model("bert")), tiny_inputs("bert"), frozenset({"blocks.1.ffn"}), {})


def test_shapes_are_those_of_what_is_left() -> None:
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    kept = {"blocks.1.ffn": torch.arange(10), "blocks.2.attention": torch.arange(2 * HEAD)}
    found = LeastSquares().fit(Stack(model), inputs, frozenset(), kept).projections
    assert found["blocks.1.ffn"].weight.shape == (HIDDEN, 10)
    assert found["blocks.2.attention"].weight.shape == (HIDDEN, 2 * HEAD)
