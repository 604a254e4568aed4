"""Sub-layers switched off in a model in memory, and back on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit.modeling.modeling_prunekit import blocks_of, bypass, present, skip
from tests.heterogeneous import without
from tests.tiny import BLOCKS, FAMILIES, PARALLEL, tiny_inputs, tiny_model


def inputs_of(block: nn.Module, model: Any, family: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments a block gets during a pass of its model; the hidden states come first."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    options = {} if family == "vit" else {"use_cache": False}
    with torch.no_grad():
        model(**tiny_inputs(family), **options)
    hook.remove()
    return seen[0]


def hidden_states(returned: Any) -> Tensor:
    """Some blocks return a tuple."""
    return returned[0] if isinstance(returned, tuple) else returned


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PARALLEL])
def test_attention_then_ffn_is_the_block_bit_for_bit(family: str) -> None:
    model = tiny_model(family)
    block = blocks_of(model)[1]
    (hidden, *others), kwargs = inputs_of(block, model, family)

    def run(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return hidden_states(block(hidden, *others, **kwargs))

    whole = run(hidden)
    undo = bypass(block, "ffn")
    attention = run(hidden)
    undo()
    undo = bypass(block, "attention")
    composed = run(attention)
    undo()
    assert torch.equal(composed, whole)
    assert not torch.equal(attention, whole)
    assert torch.equal(run(hidden), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_bypassed_is_the_identity(family: str) -> None:
    model = tiny_model(family)
    block = blocks_of(model)[2]
    (hidden, *others), kwargs = inputs_of(block, model, family)
    names = list(model.state_dict())
    undo_attention, undo_ffn = bypass(block, "attention"), bypass(block, "ffn")
    assert torch.equal(hidden_states(block(hidden, *others, **kwargs)), hidden)
    assert not any(True for _ in block.parameters())
    undo_ffn()
    undo_attention()
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("family", FAMILIES)
def test_present_follows_skips_and_bypasses(family: str) -> None:
    model = without(tiny_model(family), (0, "attention"), (1, "mlp"))
    blocks = blocks_of(model)
    found = [(present(block, "attention"), present(block, "ffn")) for block in blocks]
    assert found == [(False, True), (True, False), (True, True), (True, True)]
    undo = bypass(blocks[2], "ffn")
    assert not present(blocks[2], "ffn")
    assert present(blocks[2], "attention")
    undo()
    assert present(blocks[2], "ffn")
    bypass(blocks[0], "attention")()
    assert not present(blocks[0], "attention")


def test_skip_gives_the_heterogeneous_model() -> None:
    stock, inputs = tiny_model("qwen3"), tiny_inputs("qwen3")
    model = without(stock, (2, "attention"), (2, "mlp"))
    skip(blocks_of(stock)[2], "attention")
    skip(blocks_of(stock)[2], "ffn")
    assert list(stock.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_with_and_without_a_head(family: str) -> None:
    model = tiny_model(family)
    assert len(blocks_of(model)) == BLOCKS
    assert blocks_of(model.base_model) is blocks_of(model)


def test_unknown_model_and_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear"):
        blocks_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`mlp` of a `LlamaDecoderLayer`"):
        bypass(blocks_of(tiny_model("llama"))[0], "mlp")
