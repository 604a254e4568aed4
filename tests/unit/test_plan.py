"""Plans: what they hold, what they refuse, what they cost and how the result is laid out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prunekit.core.errors import PlanError
from prunekit.core.files import write_json
from prunekit.plan.after import after
from prunekit.plan.cost import cost, unit_cost
from prunekit.plan.interchange import read_plan
from prunekit.plan.layout import choose_layout
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery.engine import apply
from tests.tiny import BLOCKS, FFN, HEAD, HEADS, HIDDEN, KV_HEADS, VOCAB, tiny_model, write_tiny


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> ModelView:
    return ModelView.open(write_tiny("qwen3", tmp_path_factory.mktemp("qwen3")))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> ModelView:
    return ModelView.open(write_tiny("bert", tmp_path_factory.mktemp("bert")))


def block(*numbers: int) -> list[str]:
    return [f"blocks.{i}.{kind}" for i in numbers for kind in ("attention", "ffn")]


def test_plan_survives_its_file(view: ModelView, tmp_path: Path) -> None:
    plan = Plan.make(view, ["blocks.2.ffn", "blocks.0.attention"], {"blocks.1.ffn.neurons": range(8)})
    write_json(tmp_path / "plan.json", plan.to_json())
    assert read_plan(tmp_path / "plan.json", view) == plan
    assert plan.drop == ("blocks.0.attention", "blocks.2.ffn")


def test_experts_must_be_as_many_as_a_token_passes(tmp_path: Path) -> None:
    moe = ModelView.open(write_tiny("mixtral", tmp_path))
    assert moe.active_experts == 2
    with pytest.raises(PlanError, match="leaves 1 experts") as caught:
        Plan.make(moe, keep={"blocks.1.ffn.experts": (3,)})
    assert "2" in caught.value.why
    plan = Plan.make(moe, keep={f"blocks.{i}.ffn.experts": (0, i % 3 + 1) for i in range(BLOCKS)})
    layout = choose_layout(moe, plan)
    assert layout.kind == "stock"
    (tmp_path / "cut").mkdir()
    apply(moe, plan, tmp_path / "cut")
    cut = ModelView.open(tmp_path / "cut")
    assert cost(cut) == cost(moe, plan) == cost(after(moe, plan))
    assert cut.config["num_local_experts"] == 2
    expert = 3 * HIDDEN * FFN
    assert cost(moe).params - cost(cut).params == BLOCKS * 2 * (expert + HIDDEN)
    # The router is narrower; a token still passes two experts.
    assert cost(moe).flops_per_token - cost(cut).flops_per_token == BLOCKS * 2 * 2 * HIDDEN


def test_keeping_everything_is_no_cut(view: ModelView) -> None:
    assert Plan.make(view, keep={"blocks.1.ffn.neurons": range(FFN)}).keep == {}


@pytest.mark.parametrize(
    ("drop", "keep", "words"),
    [
        (["blocks.9.ffn"], {}, "does not have"),
        (block(0, 1, 2, 3), {}, "leaves no sub-layer"),
        ([], {"blocks.0.ffn.neurons": []}, "leaves no neurons"),
        ([], {"blocks.0.ffn.neurons": [3, 1]}, "must ascend"),
        ([], {"blocks.0.ffn.neurons": [0, 48]}, "must ascend"),
        ([], {"blocks.0.ffn.kv_groups": [0]}, "does not have"),
        (["blocks.0.ffn"], {"blocks.0.ffn.neurons": [0]}, "and drops"),
    ],
)
def test_impossible_plan_is_refused(view: ModelView, drop: list[str], keep: dict[str, list[int]], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.make(view, drop, keep)
    assert words in f"{caught.value.what} {caught.value.why}"


def test_plan_of_another_model_is_refused(view: ModelView, bert: ModelView) -> None:
    with pytest.raises(PlanError, match="another model"):
        Plan.make(view, block(1)).check(bert)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": 1}', '{"plan": 2, "drop": [], "keep": {}, "model": {}}',
                                  '{"plan": 1, "drop": [3], "keep": {}, "model": {}}',
                                  '{"plan": 1, "drop": [], "keep": {"a": ["x"]}, "model": {}}'])  # fmt: skip
def test_file_that_is_no_plan_is_one_error(view: ModelView, tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="is not a plan"):
        read_plan(tmp_path / "plan.json", view)


def test_later_positions_count_what_earlier_steps_kept(view: ModelView) -> None:
    first = Plan.make(view, keep={"blocks.0.ffn.neurons": [1, 5, 9], "blocks.1.ffn.neurons": [0, 1]})
    left = after(view, first)
    later = Plan.make(left, ["blocks.1.ffn"], {"blocks.0.ffn.neurons": [0, 2]})
    both = first.then(view, later)
    assert both.keep == {"blocks.0.ffn.neurons": (1, 9)}
    assert both.drop == ("blocks.1.ffn",)


def test_cost_counts_every_weight_once(view: ModelView) -> None:
    total = cost(view)
    assert total.params == sum(p.numel() for p in tiny_model("qwen3").parameters())
    assert total.weight_bytes == 4 * total.params
    assert total.block_params == sum(unit_cost(view, s.address, "params") for s in view.sublayers)
    matrices = 2 * HIDDEN * HEADS * HEAD + 2 * HIDDEN * KV_HEADS * HEAD + 3 * HIDDEN * FFN
    assert total.flops_per_token == 2 * (BLOCKS * matrices + VOCAB * HIDDEN)
    assert total.kv_bytes_per_token == BLOCKS * 2 * KV_HEADS * HEAD * 4


def test_encoder_keeps_no_cache(bert: ModelView) -> None:
    assert cost(bert).kv_bytes_per_token == 0


def test_cost_of_a_plan_is_the_cost_of_what_is_left(view: ModelView) -> None:
    plan = Plan.make(view, ["blocks.2.ffn"], {"blocks.0.attention.kv_groups": [1], "blocks.1.ffn.neurons": range(40)})
    assert cost(view, plan) == cost(after(view, plan))
    gone = cost(view).params - cost(view, plan).params
    neuron = unit_cost(view, "blocks.1.ffn.neurons.0", "params")
    group = unit_cost(view, "blocks.0.attention.kv_groups.0", "params")
    assert neuron == 3 * HIDDEN
    assert group == 2 * 2 * HEAD * HIDDEN + 2 * HEAD * HIDDEN
    assert gone == unit_cost(view, "blocks.2.ffn", "params") + 8 * neuron + group


CASES: list[tuple[str, list[str], dict[str, Any], str]] = [
    ("blocks", block(1, 2), {}, "stock"),
    ("front half block and back half block", ["blocks.1.ffn", "blocks.2.attention"], {}, "repacked"),
    ("one sub-layer", ["blocks.1.ffn"], {}, "heterogeneous"),
    ("alternating, but the FFN comes first", ["blocks.0.attention", "blocks.3.ffn"], {}, "heterogeneous"),
    ("equal widths", [], {f"blocks.{i}.ffn.neurons": range(8 + i, 40 + i) for i in range(4)}, "stock"),
    ("unequal widths", [], {"blocks.1.ffn.neurons": range(32)}, "heterogeneous"),
    ("equal KV groups", [], {f"blocks.{i}.attention.kv_groups": [i % 2] for i in range(4)}, "stock"),
]  # fmt: skip


@pytest.mark.parametrize(("drop", "keep", "kind"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_layout_is_the_simplest_that_holds_the_result(view: ModelView, drop: Any, keep: Any, kind: str) -> None:
    layout = choose_layout(view, Plan.make(view, drop, keep))
    assert layout.kind == kind
    assert (layout.reason == "") == (kind != "heterogeneous")


def test_repacked_pairs_name_their_sources(view: ModelView) -> None:
    layout = choose_layout(view, Plan.make(view, ["blocks.1.ffn", "blocks.2.attention"]))
    assert layout.pairs == ((0, 0), (1, 2), (3, 3))


def test_post_norm_models_are_not_repacked(bert: ModelView) -> None:
    plan = Plan.make(bert, ["blocks.1.ffn", "blocks.2.attention"])
    assert choose_layout(bert, plan).kind == "heterogeneous"
    with pytest.raises(PlanError, match="cannot be a stock model"):
        choose_layout(bert, plan, "stock")


def test_heads_tied_to_the_hidden_width_make_the_result_heterogeneous(bert: ModelView) -> None:
    keep = {f"blocks.{i}.attention.kv_groups": [0, 1] for i in range(BLOCKS)}
    layout = choose_layout(bert, Plan.make(bert, keep=keep))
    assert layout.kind == "heterogeneous"
    assert "hidden width" in layout.reason


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_widths_lost_in_an_earlier_cut_still_count(tmp_path: Path, family: str) -> None:
    """Three of four heads of 32 hidden numbers: no stock class divides that, whatever the next plan removes."""
    source = ModelView.open(
        write_tiny(family, tmp_path / "m", **({"num_key_value_heads": 4} if family == "llama" else {}))
    )
    keep = {f"blocks.{i}.attention.kv_groups": [0, 1, 2] for i in range(BLOCKS)}
    (tmp_path / "cut").mkdir()
    assert apply(source, Plan.make(source, keep=keep), tmp_path / "cut").kind == "heterogeneous"
    cut = ModelView.open(tmp_path / "cut")
    assert choose_layout(cut, Plan.make(cut, block(1))).kind == "heterogeneous"


def test_unknown_list_as_long_as_the_depth_forbids_a_shorter_stock_model(view: ModelView, tmp_path: Path) -> None:
    folder = write_tiny("qwen3", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "moods": [1, 2, 3, 4]}))
    other = ModelView.open(folder)
    assert "`moods`" in choose_layout(other, Plan.make(other, block(1))).reason
    assert choose_layout(other, Plan.make(other)).kind == "stock"
