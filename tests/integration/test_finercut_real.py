"""FinerCut on SmolLM2-135M: its distances and its order against whole forwards of the masked model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit.calibrate.batches import token_batch
from prunekit.calibrate.stack import Stack
from prunekit.checkpoint.sources import resolve
from prunekit.modeling.load import load_model, load_tokenizer
from prunekit.modeling.modeling_prunekit import blocks_of, bypass
from prunekit.search import _evaluator
from prunekit.search._distances import DISTANCES
from prunekit.search._evaluator import Evaluator
from prunekit.search.finercut import FinerCut

STEPS = 3
# Float32 sums in another order.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(resolve("smollm2-135m-instruct").folder)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    tokenizer = load_tokenizer(resolve("smollm2-135m-instruct").folder)
    return {"input_ids": token_batch(tokenizer, "wikitext2", 2, 32)}


def evaluator(model: Any, inputs: dict[str, Tensor]) -> Evaluator:
    return Evaluator(Stack(model), inputs, lambda address, of: 1.0)


def logits(model: Any, inputs: dict[str, Tensor], removed: Iterable[str]) -> Tensor:
    undos = []
    for address in removed:
        _, block, kind = address.split(".")
        undos.append(bypass(blocks_of(model)[int(block)], kind))
    with torch.no_grad():
        found: Tensor = model(**inputs, use_cache=False).logits.flatten(0, 1)
    for undo in undos:
        undo()
    return found


def plain(model: Any, inputs: dict[str, Tensor], reference: Tensor, removed: Iterable[str]) -> float:
    return float(DISTANCES["js"].values(reference, logits(model, inputs, removed)).double().mean())


def test_sublayers_one_after_the_other_are_the_model(model: Any, inputs: dict[str, Tensor]) -> None:
    stack = Stack(model)
    state = stack.enter(inputs)
    hidden = state.hidden
    for i in range(len(stack.addresses)):
        hidden = stack.run(i, hidden, state)
    assert torch.equal(stack.finish(hidden, state).flatten(0, 1), logits(model, inputs, ()))


def test_distances_are_those_of_the_masked_model(model: Any, inputs: dict[str, Tensor]) -> None:
    found = evaluator(model, inputs)
    found.begin("js")
    reference = DISTANCES["js"].prepare(logits(model, inputs, ()))
    some = [("blocks.0.attention",), ("blocks.14.ffn", "blocks.15.attention"), ("blocks.29.ffn",)]
    expected = [plain(model, inputs, reference, units) for units in some]
    assert found.distances(some) == pytest.approx(expected, rel=CLOSE)


@pytest.mark.slow
def test_skipping_candidates_changes_no_order(
    model: Any, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_evaluator, "_PART_POSITIONS", 32)
    found = evaluator(model, inputs)
    order = FinerCut().propose(found, lambda removed: len(removed) >= STEPS)
    assert len(found.weights) == 2
    assert found.evaluations < 90
    reference = DISTANCES["js"].prepare(logits(model, inputs, ()))
    removed: frozenset[str] = frozenset()
    for step in order.steps:
        left = [address for address in found.addresses if address not in removed]
        distances = {address: plain(model, inputs, reference, removed | {address}) for address in left}
        best = min(left, key=lambda address: distances[address])
        assert step.units == (best,)
        assert step.distance == pytest.approx(distances[best], rel=CLOSE)
        removed |= {best}
