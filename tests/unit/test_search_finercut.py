"""FinerCut against a plain loop that runs every cut model from start to end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit.calibrate.stack import Stack
from prunekit.core.errors import EvaluationError, PlanError, UsageError
from prunekit.search import _evaluator
from prunekit.search._distances import DISTANCES
from prunekit.search._evaluator import Evaluator
from prunekit.search.finercut import FinerCut
from tests.tiny import BLOCKS, tiny_inputs, tiny_model

A, M = "attention", "ffn"
COSTS = {"params": {A: 3.0, M: 5.0}, "flops": {A: 7.0, M: 4.0}, "kv_bytes": {A: 1.0, M: 0.0}}
CANDIDATES = ("sublayers", "attention", "ffn", "blocks", "pairs", "mixed")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets 4 sequences of 9 tokens be enough to skip candidates by, and one part of the data."""
    monkeypatch.setattr(_evaluator, "_PART_POSITIONS", 36)


def cost(address: str, of: str) -> float:
    return COSTS[of][address.rpartition(".")[2]]


def evaluator(model: Any, inputs: dict[str, Tensor], **options: Any) -> Evaluator:
    return Evaluator(Stack(model), inputs, cost, **options)


def removing(count: int) -> Callable[[frozenset[str]], bool]:
    return lambda removed: len(removed) >= count


def openings(kind: str, addresses: Iterable[str], removed: frozenset[str]) -> list[tuple[str, ...]]:
    """What may go, spelt out."""
    alive = [address for address in addresses if address not in removed]
    singles = [(address,) for address in alive]
    neighbours = [
        pair for pair in itertools.pairwise(alive) if pair[0].rpartition(".")[2] != pair[1].rpartition(".")[2]
    ]
    pairs = [
        pair
        for pair in neighbours
        if [a.rpartition(".")[2] for a in alive if a not in pair] == [A, M] * (len(alive) // 2 - 1)
    ]
    return {
        "sublayers": singles,
        "attention": [part for part in singles if part[0].endswith(A)],
        "ffn": [part for part in singles if part[0].endswith(M)],
        "blocks": [(f"blocks.{i}.{A}", f"blocks.{i}.{M}") for i in range(BLOCKS) if f"blocks.{i}.{A}" in alive],
        "pairs": pairs,
        "mixed": singles + neighbours,
    }[kind]


def plain_loop(
    model: Any, inputs: dict[str, Tensor], kind: str, count: int, distance: str = "js", per: str | None = None
) -> list[tuple[str, ...]]:
    """The removal order, every candidate run from the first sub-layer to the logits at every step."""
    stack = Stack(model)
    state = stack.enter(inputs)
    chosen = DISTANCES[distance]

    def outputs(removed: frozenset[str]) -> Tensor:
        hidden = state.hidden
        for i, address in enumerate(stack.addresses):
            hidden = hidden if address in removed else stack.run(i, hidden, state)
        return stack.finish(hidden, state).flatten(0, -2)

    def far(removed: frozenset[str]) -> float:
        cut = outputs(removed)
        total, number = chosen.total(chosen.values(reference, cut), [cut.shape[0] // state.sequences] * state.sequences)
        return float(total) / number

    following = None
    if chosen.text:
        following = torch.cat([inputs["input_ids"][:, 1:], torch.full((state.sequences, 1), -1)], 1).flatten()
    reference = chosen.prepare(outputs(frozenset()), following)
    removed, order, base = frozenset[str](), [], 0.0
    while len(removed) < count:
        found = {units: far(removed.union(units)) for units in openings(kind, stack.addresses, removed)}
        saved = {units: sum(cost(a, per) for a in units) if per else 1.0 for units in found}
        best = min((units for units in found if saved[units]), key=lambda units: (found[units] - base) / saved[units])
        base, removed = found[best], removed.union(best)
        order.append(best)
    return order


def units(order: Any) -> list[tuple[str, ...]]:
    return [step.units for step in order.steps]


# Random models on which skipping finds the plain order; on others it may err, as the class says.
@pytest.mark.parametrize("seed", [0, 2, 3])
@pytest.mark.parametrize("kind", CANDIDATES)
def test_skipping_candidates_changes_no_order(kind: str, seed: int) -> None:
    model, inputs = tiny_model("llama", seed), tiny_inputs("llama", batch=4)
    count = 3 if kind in (A, M) else 4
    expected = plain_loop(model, inputs, kind, count)
    for exact in (True, False):
        found = FinerCut(candidates=kind, exact=exact).propose(evaluator(model, inputs), removing(count))
        assert units(found) == expected


@pytest.mark.parametrize("per", [None, *COSTS])
@pytest.mark.parametrize("distance", DISTANCES)
def test_every_distance_and_rule_gives_the_plain_order(distance: str, per: Any) -> None:
    model, inputs = tiny_model("qwen3"), tiny_inputs("qwen3", batch=4)
    expected = plain_loop(model, inputs, "sublayers", 3, distance, per)
    for exact in (True, False):
        found = FinerCut(distance=distance, per=per, exact=exact).propose(evaluator(model, inputs), removing(3))  # type: ignore[arg-type]
        assert units(found) == expected


@pytest.mark.parametrize(("family", "distance"), [("gpt2", "kl"), ("bert", "angular"), ("vit", "js")])
def test_every_architecture_gives_the_plain_order(family: str, distance: Any) -> None:
    model, inputs = tiny_model(family), tiny_inputs(family, batch=4)
    found = FinerCut(distance=distance).propose(evaluator(model, inputs), removing(4))
    assert units(found) == plain_loop(model, inputs, "sublayers", 4, distance)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("kind", ["sublayers", "pairs"])
def test_looking_at_little_data_first_changes_no_order(
    kind: Any, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_evaluator, "_PART_POSITIONS", 18)
    monkeypatch.setattr(Evaluator, "width", lambda self, part: together)
    model, inputs = tiny_model("llama", 1), tiny_inputs("llama", batch=2)
    # Every part of the data is alike, so that a look at one tells all.
    repeated = {name: value.repeat(8, 1) for name, value in inputs.items()}
    in_parts = evaluator(model, repeated)
    found = FinerCut(candidates=kind).propose(in_parts, removing(4))
    assert len(in_parts.weights) == 4
    assert units(found) == plain_loop(model, inputs, kind, 4)
    exact = evaluator(model, repeated)
    FinerCut(candidates=kind, exact=True).propose(exact, removing(4))
    assert in_parts.evaluations < 0.75 * exact.evaluations


def test_every_step_tells_the_distance_to_the_dense_model() -> None:
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    found = FinerCut().propose(evaluator(model, inputs), removing(3))
    check = evaluator(model, inputs)
    check.begin("js")
    gone = list(itertools.accumulate(units(found)))
    assert [step.distance for step in found.steps] == pytest.approx(check.distances(gone), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_leave_attention_and_ffn_taking_turns(seed: int) -> None:
    found = evaluator(tiny_model("llama", seed), tiny_inputs("llama"))
    order = FinerCut(candidates="pairs").propose(found, removing(6))
    removed: set[str] = set()
    for step in order.steps:
        removed.update(step.units)
        left = [address.rpartition(".")[2] for address in found.addresses if address not in removed]
        assert left == [A, M] * (len(left) // 2)


def test_sublayers_that_must_alternate_go_in_pairs() -> None:
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    alternating = FinerCut().propose(evaluator(model, inputs), removing(4), kind="pairs")
    model = tiny_model("llama")
    pairs = FinerCut(candidates="pairs").propose(evaluator(model, inputs), removing(4))
    assert units(alternating) == units(pairs)
    with pytest.raises(UsageError, match="keep_alternating"):
        FinerCut(candidates="ffn").propose(evaluator(model, inputs), removing(4), kind="pairs")


@pytest.mark.parametrize(
    ("protect", "blocks", "until"),
    # Of 8 sub-layers: floor(8 x / 2) + 1 blocks, until floor(8 x) + 1 are gone.
    [(0.0, 0, 0), (0.1, 1, 1), (0.25, 2, 3), (0.5, 3, 5)],
)
def test_the_front_is_withheld_as_long_as_in_the_paper(protect: float, blocks: int, until: int) -> None:
    # The first blocks do nothing, so that the search takes them as soon as it may.
    model = tiny_model("llama")
    for block in model.model.layers[:blocks]:
        for matrix in (block.self_attn.o_proj, block.mlp.down_proj):
            torch.nn.init.zeros_(matrix.weight)
            if matrix.bias is not None:
                torch.nn.init.zeros_(matrix.bias)
    front = {f"blocks.{i}.{kind}" for i in range(blocks) for kind in (A, M)}
    open_ = 2 * (BLOCKS - blocks)
    found = FinerCut(protect_front=protect).propose(evaluator(model, tiny_inputs("llama")), removing(7))
    order = [step.units[0] for step in found.steps]
    # Where too few others are left, the front is handed back when they are gone.
    free = min(until, open_)
    assert not front.intersection(order[:free])
    assert set(order[free : free + len(front)]) <= front or len(order) < free + len(front)


def test_attention_alone_counts_one_sublayer_a_block_at_the_front() -> None:
    found = FinerCut(protect_front=0.5).propose(
        evaluator(tiny_model("llama"), tiny_inputs("llama")), removing(1), kind=A
    )
    assert units(found) == [(f"blocks.3.{A}",)]


def test_protected_sublayers_stay() -> None:
    safe = frozenset({"blocks.0.ffn", "blocks.3.ffn", "blocks.2.attention"})
    found = evaluator(tiny_model("llama"), tiny_inputs("llama"), protected=safe)
    order = FinerCut().propose(found, removing(5))
    assert not safe.intersection(unit for step in order.steps for unit in step.units)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["sublayers", "pairs", "blocks"])
@pytest.mark.parametrize("seed", range(3))
def test_swaps_never_make_the_distance_larger(kind: Any, seed: int, exact: bool) -> None:
    model, inputs = tiny_model("llama", seed), tiny_inputs("llama", batch=4)
    greedy = FinerCut(candidates=kind, exact=exact).propose(evaluator(model, inputs), removing(4))
    found = evaluator(model, inputs)
    swapped = FinerCut(candidates=kind, exact=exact, swaps=3).propose(found, removing(4))
    assert swapped.steps[-1].distance <= greedy.steps[-1].distance
    gone = [unit for step in swapped.steps for unit in step.units]
    assert len(gone) == len(set(gone)) == 4
    assert frozenset(gone) == found.removed
    if swapped.provenance["swaps"]:
        assert swapped.steps[-1].distance < greedy.steps[-1].distance
    if kind == "pairs":
        left = [address.rpartition(".")[2] for address in found.addresses if address not in gone]
        assert left == [A, M] * 2


def test_swaps_reach_the_best_set_that_one_exchange_leads_to() -> None:
    model, inputs = tiny_model("gpt2", 3), tiny_inputs("gpt2")
    found = evaluator(model, inputs)
    start = frozenset(u for step in FinerCut().propose(found, removing(3)).steps for u in step.units)
    near = [(start - {gone}) | {new} for gone in start for new in found.addresses if new not in start]
    best = min(found.mean(parts) for parts in found.whole(near))
    order = FinerCut(swaps=1, exact=True).propose(found, removing(3))
    assert order.steps[-1].distance == pytest.approx(min(best, found.mean(found.base)), rel=1e-9)


def test_an_exchange_keeps_the_budget() -> None:
    def enough(removed: frozenset[str]) -> bool:
        return sum(cost(address, "params") for address in removed) >= 13

    found = evaluator(tiny_model("llama", 1), tiny_inputs("llama"))
    FinerCut(swaps=4).propose(found, enough)
    assert enough(found.removed)


def test_with_few_outputs_all_candidates_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_evaluator, "_PART_POSITIONS", 37)
    found = evaluator(tiny_model("llama"), tiny_inputs("llama", batch=4))
    FinerCut().propose(found, removing(3))
    assert found.evaluations == 8 + 7 + 6


def test_no_budget_removes_nothing() -> None:
    assert FinerCut().propose(evaluator(tiny_model("llama"), tiny_inputs("llama")), removing(0)).steps == ()


def test_one_sublayer_stays_whatever_is_asked() -> None:
    with pytest.raises(PlanError, match="budget cannot be reached") as error:
        FinerCut().propose(evaluator(tiny_model("llama"), tiny_inputs("llama")), removing(8))
    assert "1 sub-layers are left" in error.value.why


def test_what_saves_nothing_does_not_go() -> None:
    with pytest.raises(PlanError, match="budget cannot be reached") as error:
        FinerCut(per="kv_bytes").propose(evaluator(tiny_model("llama"), tiny_inputs("llama")), removing(5))
    assert "kv_bytes" in error.value.why


@pytest.mark.parametrize(
    ("knobs", "kind", "said"),
    [
        ({"candidates": "pairs"}, "blocks", "`candidates: pairs` does not go with `remove: blocks`"),
        ({"candidates": "sublayers"}, "attention", "`candidates: sublayers` does not go with `remove: attention`"),
        ({"per": "kv_bytes"}, "ffn", "`per: kv_bytes` does not go with FFNs"),
    ],
)
def test_knobs_that_do_not_go_with_the_kind_are_refused(knobs: Any, kind: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        FinerCut(**knobs).propose(evaluator(tiny_model("llama"), tiny_inputs("llama")), removing(1), kind=kind)
    assert error.value.what == said


def test_overflow_everywhere_is_an_error() -> None:
    model = tiny_model("llama")
    found = evaluator(model, tiny_inputs("llama"))
    begin = found.begin

    def then_break(distance: str, advance: Any = None) -> None:
        begin(distance, advance)
        torch.nn.init.constant_(model.lm_head.weight, float("inf"))

    found.begin = then_break  # type: ignore[method-assign]
    with pytest.raises(EvaluationError, match="no candidate"):
        FinerCut().propose(found, removing(1))


def test_the_order_says_what_it_cost() -> None:
    found = evaluator(tiny_model("llama"), tiny_inputs("llama"))
    order = FinerCut().propose(found, removing(2))
    assert order.method == "finercut"
    assert order.provenance["distance"] == "js"
    assert order.provenance["candidates"] == "sublayers"
    assert 8 < order.provenance["evaluations"] <= 15
    assert order.provenance["sublayer_runs"] > 8


def test_progress_shows_candidates() -> None:
    told: list[float] = []

    class Recorder:
        def task(self, name: str, total: float | None = None, unit: str = "") -> Any:
            assert (name, unit) == ("searching", "candidates")
            return self

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def advance(self, amount: float = 1) -> None:
            told.append(amount)

    found = evaluator(tiny_model("llama"), tiny_inputs("llama"))
    FinerCut().propose(found, removing(2), Recorder())
    assert sum(told) == found.evaluations
