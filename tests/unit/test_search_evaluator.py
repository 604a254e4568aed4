"""The evaluator's distances against whole forwards of the cut model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit.calibrate.stack import Stack
from prunekit.core.errors import EvaluationError, UsageError
from prunekit.modeling.modeling_prunekit import blocks_of, bypass
from prunekit.search import _evaluator
from prunekit.search._distances import DISTANCES
from prunekit.search._evaluator import Evaluator
from tests.tiny import SEQUENTIAL, WITHOUT_LOGITS, tiny_inputs, tiny_model

FAMILY_DISTANCE = [(family, "norm" if family in WITHOUT_LOGITS else "js") for family in SEQUENTIAL]


def no_cost(address: str, of: str) -> float:
    return 1.0


def evaluator(stack: Stack, inputs: dict[str, Tensor], distance: str = "js", **options: Any) -> Evaluator:
    found = Evaluator(stack, inputs, no_cost, **options)
    found.begin(distance)
    return found


def outputs(model: Any, inputs: dict[str, Tensor], removed: Iterable[str]) -> Tensor:
    """Outputs of the model with sub-layers bypassed, positions that are not padding."""
    blocks = blocks_of(model)
    undos = []
    for address in removed:
        _, block, kind = address.split(".")
        undos.append(bypass(blocks[int(block)], kind))
    with torch.no_grad():
        result = model(**inputs)
    for undo in undos:
        undo()
    found = result.last_hidden_state if getattr(result, "logits", None) is None else result.logits
    mask = inputs.get("attention_mask")
    return found if found.dim() == 2 else found.flatten(0, 1) if mask is None else found[mask.bool()]


def plain(model: Any, inputs: dict[str, Tensor], removed: Iterable[str], distance: str = "js") -> float:
    chosen = DISTANCES[distance]
    dense, cut = outputs(model, inputs, ()), outputs(model, inputs, removed)
    sequences = next(iter(inputs.values())).shape[0]
    mask = inputs.get("attention_mask")
    lengths = [dense.shape[0] // sequences] * sequences if mask is None else mask.sum(1).tolist()
    following = None
    if chosen.text:
        ids, after = inputs["input_ids"], torch.full_like(inputs["input_ids"], -1)
        after[:, :-1] = ids[:, 1:]
        if mask is not None:
            after[:, :-1][mask[:, 1:] == 0] = -1
        following = after.flatten() if mask is None else after[mask.bool()]
    total, count = chosen.total(chosen.values(chosen.prepare(dense, following), cut), lengths)
    return float(total) / count


def padded_inputs(family: str, batch: int = 3) -> dict[str, Tensor]:
    inputs = tiny_inputs(family, batch=batch)
    if "input_ids" in inputs:
        lengths = torch.arange(9, 9 - batch, -1)
        inputs["attention_mask"] = (torch.arange(9) < lengths[:, None]).long()
    return inputs


def candidates(stack: Stack) -> list[tuple[str, ...]]:
    """Sub-layers, a block and two neighbours from different blocks."""
    a = stack.addresses
    return [(a[5],), (a[0],), (a[7],), (a[2], a[3]), (a[3], a[4]), (a[6], a[7])]


@pytest.mark.parametrize(("family", "distance"), FAMILY_DISTANCE)
def test_distances_are_those_of_the_masked_model(family: str, distance: str) -> None:
    model, inputs = tiny_model(family), padded_inputs(family)
    stack = Stack(model)
    found = evaluator(stack, inputs, distance).distances(candidates(stack))
    expected = [plain(model, inputs, units, distance) for units in candidates(stack)]
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_add_to_what_is_removed_already(distance: str) -> None:
    model, inputs = tiny_model("llama"), padded_inputs("llama")
    stack = Stack(model)
    found = evaluator(stack, inputs, distance)
    gone = frozenset({"blocks.1.ffn", "blocks.3.attention"})
    found.move(gone)
    assert found.mean(found.base) == pytest.approx(plain(model, inputs, gone, distance), rel=1e-9)
    left = [units for units in candidates(stack) if not gone.intersection(units)]
    expected = [plain(model, inputs, gone.union(units), distance) for units in left]
    assert found.distances(left) == pytest.approx(expected, rel=1e-9)


def test_sublayers_can_come_back() -> None:
    model, inputs = tiny_model("qwen2"), padded_inputs("qwen2")
    found = evaluator(Stack(model), inputs)
    found.move(frozenset({"blocks.0.ffn", "blocks.2.attention"}))
    other = [frozenset({"blocks.2.attention"}), frozenset({"blocks.0.ffn", "blocks.3.ffn"}), found.removed]
    expected = [plain(model, inputs, removed) for removed in other]
    assert [found.mean(parts) for parts in found.whole(other)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("batch_tokens", [1, 18, 40, 1000])
def test_batches_of_any_size_give_the_same(batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_evaluator, "_PART_POSITIONS", 9)
    model, inputs = tiny_model("llama"), padded_inputs("llama", batch=5)
    stack = Stack(model)
    found = evaluator(stack, inputs, "norm", batch_tokens=batch_tokens)
    assert len(found.weights) == {1: 5, 18: 4, 40: 3, 1000: 3}[batch_tokens]
    expected = [plain(model, inputs, units, "norm") for units in candidates(stack)]
    assert found.distances(candidates(stack)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("limit", ["_CPU_REFERENCE_BYTES", "_CPU_KEPT_BYTES", "_CPU_PIECE_BYTES"])
def test_little_memory_gives_the_same(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_model("llama"), padded_inputs("llama")
    stack = Stack(model)
    expected = evaluator(stack, inputs).distances(candidates(stack))
    # Outputs recomputed, every third hidden state kept, one position of 64 words a piece.
    monkeypatch.setattr(_evaluator, limit, {"_CPU_KEPT_BYTES": 12 * 3 * 9 * 32 * 8}.get(limit, 4 * 64))
    assert evaluator(stack, inputs).distances(candidates(stack)) == pytest.approx(expected, rel=1e-12)


def test_a_candidate_runs_from_where_it_differs_on() -> None:
    stack = Stack(tiny_model("llama"))
    found = evaluator(stack, tiny_inputs("llama"))
    assert found.sublayer_runs() == 8
    found.distances([("blocks.2.attention",)])
    assert found.sublayer_runs() == 8 + 3
    found.distances([("blocks.3.ffn",), ("blocks.0.attention",)])
    assert found.sublayer_runs() == 8 + 3 + 0 + 7
    assert found.evaluations == 3


def test_hidden_states_before_a_removal_stay() -> None:
    stack = Stack(tiny_model("llama"))
    found = evaluator(stack, tiny_inputs("llama"))
    found.move(frozenset({"blocks.2.attention"}), found.base)
    before = found.sublayer_runs()
    found.distances([("blocks.1.ffn",)])
    assert found.sublayer_runs() == before + 3
    # The FFN of block 2 runs once more for the current model, then that of block 3 is what a candidate leaves out.
    found.distances([("blocks.3.ffn",)])
    assert found.sublayer_runs() == before + 3 + 2


def test_a_candidate_runs_again_from_what_went_since_on() -> None:
    stack = Stack(tiny_model("llama"))
    found = evaluator(stack, tiny_inputs("llama"))
    gone = frozenset({"blocks.3.attention"})
    found.distances([("blocks.1.ffn",)])
    found.move(gone, found.base)
    before = found.sublayer_runs()
    again = found.distances([("blocks.1.ffn",)])
    assert found.sublayer_runs() == before + 1
    assert again == pytest.approx([plain(stack.model, tiny_inputs("llama"), gone | {"blocks.1.ffn"})], rel=1e-9)


def test_progress_counts_parts_by_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_evaluator, "_PART_POSITIONS", 9)
    told: list[float] = []
    found = Evaluator(Stack(tiny_model("llama")), tiny_inputs("llama", batch=8), no_cost)
    found.begin("js", told.append)
    found.measure([frozenset({"blocks.0.ffn"})], 0)
    assert told == [1 / 8]
    assert found.evaluations == 1 / 8
    assert found.weights == (1 / 8, 1 / 8, 1 / 4, 1 / 2)


def test_probabilities_need_logits() -> None:
    found = Evaluator(Stack(tiny_model("bert")), tiny_inputs("bert"), no_cost)
    with pytest.raises(UsageError, match="`distance: js` does not go with `BertModel`") as error:
        found.begin("js")
    assert "angular" in error.value.hint


def test_a_dense_model_that_overflows_is_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    with pytest.raises(EvaluationError, match="not numbers"):
        evaluator(Stack(model), tiny_inputs("llama"))


def test_a_cut_model_that_overflows_is_infinitely_far() -> None:
    model = tiny_model("llama")
    found = evaluator(Stack(model), tiny_inputs("llama"))
    # Stands for a sum that only stays in range while nothing is missing.
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(math.inf)
    assert found.distances([("blocks.0.ffn",)]) == [math.inf]


def test_costs_come_from_the_caller() -> None:
    found = Evaluator(Stack(tiny_model("llama")), tiny_inputs("llama"), lambda address, of: len(address + of))
    assert found.cost("blocks.0.ffn", "params") == len("blocks.0.ffnparams")


def test_sublayers_of_one_shape_share_their_latency() -> None:
    found = Evaluator(Stack(tiny_model("llama")), tiny_inputs("llama"), no_cost)
    times = {address: found.cost(address, "latency_ms") for address in found.addresses}
    assert len(set(times.values())) == 2
    assert times["blocks.0.ffn"] == times["blocks.3.ffn"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "distance"), FAMILY_DISTANCE)
def test_a_gpu_gives_the_distances_of_the_cpu(family: str, distance: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    inputs = padded_inputs(family, batch=5)
    on_cpu = evaluator(Stack(tiny_model(family)), inputs, distance)
    on_gpu = evaluator(Stack(tiny_model(family).cuda()), inputs, distance)
    some = candidates(on_cpu.stack)
    assert on_gpu.distances(some) == pytest.approx(on_cpu.distances(some), rel=1e-9)
