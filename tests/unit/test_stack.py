"""A stack's sub-layers, one after the other, are the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from prunekit.calibrate.stack import Stack, State
from prunekit.core.errors import StructureError
from prunekit.modeling.modeling_prunekit import blocks_of, bypass, skip
from tests.tiny import EAGER, PARALLEL, SEQUENTIAL, tiny_inputs, tiny_model

# Float64; batches of another size sum in another order.
CLOSE = 1e-12


def outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    logits = getattr(found, "logits", None)
    return found.last_hidden_state if logits is None else logits


def padded(family: str, side: str) -> dict[str, Tensor]:
    if family in EAGER and side == "left":
        pytest.skip("the stock model gives no numbers")
    inputs = tiny_inputs(family)
    if "input_ids" not in inputs or side == "none":
        return inputs
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, : 3 if side == "left" else None] = 0
    if side == "right":
        mask[1] = torch.tensor([1] * 6 + [0] * 3)
    return {**inputs, "attention_mask": mask}


def through(stack: Stack, hidden: Tensor, state: State) -> Tensor:
    for i in range(len(stack.addresses)):
        hidden = stack.run(i, hidden, state)
    return hidden


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", SEQUENTIAL)
def test_sublayers_one_after_the_other_are_the_model(family: str, side: str) -> None:
    model, inputs = tiny_model(family), padded(family, side)
    stack = Stack(model)
    state = stack.enter(inputs)
    assert torch.equal(stack.finish(through(stack, state.hidden, state), state), outputs(model, inputs))


def test_sublayers_are_the_model_in_bfloat16() -> None:
    model, inputs = tiny_model("llama", dtype=torch.bfloat16), tiny_inputs("llama")
    stack = Stack(model)
    state = stack.enter(inputs)
    assert torch.equal(stack.finish(through(stack, state.hidden, state), state), outputs(model, inputs))


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_leaving_a_sublayer_out_is_the_model_without_it(family: str) -> None:
    model, inputs = tiny_model(family), tiny_inputs(family)
    stack = Stack(model)
    state = stack.enter(inputs)
    hidden = state.hidden
    for i, address in enumerate(stack.addresses):
        hidden = hidden if address == "blocks.2.attention" else stack.run(i, hidden, state)
    found = stack.finish(hidden, state)
    bypass(blocks_of(model)[2], "attention")
    assert torch.equal(found, outputs(model, inputs))


def test_addresses_skip_what_a_heterogeneous_model_lacks() -> None:
    model, inputs = tiny_model("qwen2"), tiny_inputs("qwen2")
    skip(blocks_of(model)[1], "attention")
    skip(blocks_of(model)[3], "ffn")
    stack = Stack(model)
    assert stack.addresses[1:4] == ("blocks.0.ffn", "blocks.1.ffn", "blocks.2.attention")
    assert len(stack.addresses) == 6
    state = stack.enter(inputs)
    assert torch.equal(stack.finish(through(stack, state.hidden, state), state), outputs(model, inputs))


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("family", SEQUENTIAL)
def test_versions_that_run_together_do_not_mix(family: str, side: str) -> None:
    stack = Stack(tiny_model(family))
    state = stack.enter(padded(family, side))
    versions = [state.hidden * scale for scale in (1.0, 1.1, 0.7)]
    together = stack.finish(through(stack, torch.cat(versions), state), state)
    alone = torch.cat([stack.finish(through(stack, version, state), state) for version in versions])
    assert (together - alone).abs().max() < CLOSE


def test_as_many_tokens_as_sequences_are_not_taken_for_each_other() -> None:
    inputs = tiny_inputs("llama", batch=9, length=9)
    inputs["attention_mask"] = (torch.arange(9) < torch.arange(9, 0, -1)[:, None]).long()
    stack = Stack(tiny_model("llama"))
    state = stack.enter(inputs)
    together = through(stack, torch.cat([state.hidden, state.hidden]), state)
    assert (together[9:] - through(stack, state.hidden, state)).abs().max() < CLOSE


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("family", SEQUENTIAL)
def test_pieces_are_the_outputs_at_positions_that_are_not_padding(family: str, side: str) -> None:
    model, inputs = tiny_model(family), padded(family, side)
    stack = Stack(model)
    state = stack.enter(inputs)
    hidden = through(stack, state.hidden, state)
    # Three positions of 64 words a piece.
    pieces = list(stack.pieces(stack.features(hidden, state), state, 3 * 4 * 64))
    expected = outputs(model, inputs)
    if expected.dim() == 3:
        mask = inputs.get("attention_mask", torch.ones(expected.shape[:2]))
        expected = expected[mask.bool()]
        assert len(pieces) > 1
    assert (torch.cat(pieces) - expected).abs().max() < CLOSE


class Capped(LlamaForCausalLM):
    """Does something after its head, as models with a soft cap do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = found.logits.tanh()
        return found


class CappedPositions(Capped):
    def forward(self, *args: Any, logits_to_keep: int | Tensor = 0, **kwargs: Any) -> Any:
        return super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)


@pytest.mark.parametrize("cls", [Capped, CappedPositions])
def test_a_model_that_changes_its_logits_gives_them_by_its_own_end(cls: type) -> None:
    plain, inputs = tiny_model("llama"), padded("llama", "left")
    model = cls(plain.config).double().eval()
    model.load_state_dict(plain.state_dict())
    stack = Stack(model)
    state = stack.enter(inputs)
    assert not stack.splits(state)
    hidden = through(stack, state.hidden, state)
    pieces = torch.cat(list(stack.pieces(stack.features(hidden, state), state, 4 * 4 * 64)))
    assert (pieces - outputs(model, inputs)[inputs["attention_mask"].bool()]).abs().max() < CLOSE


def test_a_plain_model_gives_logits_by_its_head() -> None:
    stack = Stack(tiny_model("qwen3"))
    assert stack.splits(stack.enter(tiny_inputs("qwen3")))


def test_the_model_stays_as_it_was() -> None:
    model, inputs = tiny_model("gpt2"), tiny_inputs("gpt2")
    before, modules = outputs(model, inputs), [id(module) for module in model.modules()]
    stack = Stack(model)
    state = stack.enter(inputs)
    stack.features(through(stack, state.hidden, state), state)
    assert [id(module) for module in model.modules()] == modules
    assert not [module for module in model.modules() if "forward" in module.__dict__]
    assert torch.equal(outputs(model, inputs), before)


def test_no_mask_where_nothing_is_padding() -> None:
    inputs = tiny_inputs("llama")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert Stack(tiny_model("llama")).enter(inputs).mask is None


def test_nothing_needs_a_gradient() -> None:
    stack = Stack(tiny_model("llama"))
    state = stack.enter(tiny_inputs("llama"))
    assert not stack.finish(through(stack, state.hidden, state), state).requires_grad


@pytest.mark.parametrize("family", PARALLEL)
def test_parallel_sublayers_cannot_run_one_at_a_time(family: str) -> None:
    with pytest.raises(StructureError, match="cannot be run one at a time"):
        Stack(tiny_model(family))
