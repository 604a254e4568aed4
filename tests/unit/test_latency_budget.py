"""Budgets in milliseconds: what a cost table predicts, and what goes so that it fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunekit.core.errors import PlanError, UsageError
from prunekit.core.recipe import parse_recipe
from prunekit.core.recipe_model import Budget
from prunekit.core.recipe_problems import InvalidRecipeError
from prunekit.core.types import OrderStep
from prunekit.plan.allocate import allocate
from prunekit.plan.budget import Scored, Target
from prunekit.plan.costs import CostTable, model_of, read_costs
from prunekit.plan.fit_latency import spare
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from tests.tiny import BLOCKS, FFN, KV_HEADS, write_tiny

ATTENTION_MS, FFN_MS, REST_MS = 2.0, 3.0, 1.0


@pytest.fixture
def view(tmp_path: Path) -> ModelView:
    return ModelView.open(write_tiny("llama", tmp_path / "model"))


@pytest.fixture
def table(view: ModelView) -> CostTable:
    return CostTable(
        on="torch",
        batch=1,
        tokens=16,
        model=model_of(view),
        overhead_ms=REST_MS,
        attention={KV_HEADS: ATTENTION_MS, 1: 1.0},
        ffn={FFN: FFN_MS, FFN // 2: 1.5},
        environment={"machine": {}},
        measured={"blocks": BLOCKS},
    )


def budget(**fields: Any) -> Budget:
    return Budget(within=fields.pop("within", "model"), **fields)


def scores(view: ModelView, kind: str, value: Callable[[int, int], float]) -> list[Scored]:
    """Scores of every group of a kind by the numbers of group and unit."""
    return [Scored(group, [value(g, u) for u in range(len(group.units))]) for g, group in enumerate(view.groups(kind))]


def test_prediction_adds_up_sublayers_and_the_rest(view: ModelView, table: CostTable) -> None:
    assert table.predict(view) == pytest.approx(REST_MS + BLOCKS * (ATTENTION_MS + FFN_MS))
    cut = Plan.make(view, ["blocks.0.ffn"], {"blocks.1.ffn.neurons": range(FFN * 3 // 4)})
    # Three quarters lie half way between what was measured at a half and at the whole.
    assert table.predict(view) - table.predict(view, cut) == pytest.approx(FFN_MS + 0.75)


def test_whole_units_lose_the_least_score_that_fits(view: ModelView, table: CostTable) -> None:
    # Removing the two cheapest in score saves 2 + 2 ms, not the 5 that are needed; an FFN and an attention do.
    worth = {"blocks.1.attention": 0.1, "blocks.2.attention": 0.2, "blocks.2.ffn": 0.25}
    scored = scores(view, "sublayers", lambda g, u: worth.get(view.groups("sublayers")[0].units[u], 9.0))
    plan = allocate(view, view, "sublayers", scored, budget(latency_ms=table.predict(view) - 5), table)
    assert plan.drop == ("blocks.1.attention", "blocks.2.ffn")
    assert table.predict(view, plan) == pytest.approx(table.predict(view) - 5)


def test_protected_units_stay(view: ModelView, table: CostTable) -> None:
    scored = scores(view, "sublayers", lambda g, u: float(u))
    asked = budget(latency_ms=table.predict(view) - 5, protect=("blocks.0.*", "blocks.1.*"))
    plan = allocate(view, view, "sublayers", scored, asked, table)
    assert plan.drop == ("blocks.2.attention", "blocks.2.ffn")


def test_blocks_cost_both_their_sublayers(view: ModelView, table: CostTable) -> None:
    scored = scores(view, "blocks", lambda g, u: float(-u))
    plan = allocate(view, view, "blocks", scored, budget(latency_ms=table.predict(view) - 5.5), table)
    assert plan.drop == tuple(f"blocks.{i}.{kind}" for i in (2, 3) for kind in ("attention", "ffn"))


def test_widths_stay_alike_within_groups(view: ModelView, table: CostTable) -> None:
    scored = scores(view, "neurons", lambda g, u: float(u))
    asked = budget(latency_ms=table.predict(view) - 2.1, within="group", multiple_of=8)
    plan = allocate(view, view, "neurons", scored, asked, table)
    # 8 neurons fewer in four FFNs save 2 ms, 16 save 4.
    assert {len(kept) for kept in plan.keep.values()} == {FFN - 16}
    assert len(plan.keep) == BLOCKS


def test_widths_that_compete_go_where_the_least_is_lost(view: ModelView, table: CostTable) -> None:
    scored = scores(view, "neurons", lambda g, u: 1.0 if g == 2 else 10.0 + g)
    asked = budget(latency_ms=table.predict(view) - 1.5, multiple_of=8)
    plan = allocate(view, view, "neurons", scored, asked, table)
    assert {address: len(kept) for address, kept in plan.keep.items()} == {"blocks.2.ffn.neurons": FFN // 2}


def test_kv_groups_go_by_their_own_costs(view: ModelView, table: CostTable) -> None:
    scored = scores(view, "kv_groups", lambda g, u: float(g + u))
    plan = allocate(view, view, "kv_groups", scored, budget(latency_ms=table.predict(view) - 2), table)
    assert dict(plan.keep) == {f"blocks.{i}.attention.kv_groups": (1,) for i in (0, 1)}


def test_pairs_go_until_the_time_is_met(view: ModelView, table: CostTable) -> None:
    scored = scores(view, "sublayers", lambda g, u: float(-u))
    asked = budget(latency_ms=table.predict(view) - 5, keep_alternating=True)
    assert len(allocate(view, view, "sublayers", scored, asked, table).drop) == 2


def test_a_target_below_what_can_be_reached_says_so(view: ModelView, table: CostTable) -> None:
    for kind, within in (("neurons", "group"), ("neurons", "model"), ("sublayers", "model")):
        scored = scores(view, kind, lambda g, u: float(u))
        with pytest.raises(PlanError, match="cannot be reached by removing"):
            allocate(view, view, kind, scored, budget(latency_ms=0.5, within=within), table)


def test_a_target_that_is_met_already_says_so(view: ModelView, table: CostTable) -> None:
    with pytest.raises(PlanError, match="is met as it is"):
        allocate(view, view, "sublayers", scores(view, "sublayers", lambda g, u: 1.0), budget(latency_ms=99.0), table)


def test_a_search_gives_back_what_its_last_step_made_needless(view: ModelView, table: CostTable) -> None:
    target = Target(view, view, budget(latency_ms=table.predict(view) - 4), "sublayers", 8, table=table)
    steps = [OrderStep(("blocks.1.attention",), 0.1), OrderStep(("blocks.2.ffn",), 0.3)]
    # 2 ms are not enough, 2 + 3 are; neither alone is, so both go.
    assert spare(steps, target) == steps
    steps.append(OrderStep(("blocks.3.ffn",), 0.4))
    # With the third, 3 + 3 would do without the first, and 2 + 3 without the second, which added most.
    assert [step.units for step in spare(steps, target)] == [("blocks.1.attention",), ("blocks.3.ffn",)]


def test_a_table_survives_its_file(table: CostTable, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(table.to_json()), encoding="utf-8")
    assert read_costs(file) == table


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"costs": 2}, "`costs` must be 1"),
        ({"on": "gguf"}, "torch or onnxruntime"),
        ({"overhead_ms": -1}, "no time"),
        ({"attention": {}}, "no milliseconds"),
        ({"ffn": {"wide": 1.0}}, "invalid literal"),
        ({"model": None}, "missing or of the wrong type"),
    ],
    ids=["version", "runtime", "negative", "empty", "width", "model"],
)
def test_a_file_that_is_no_table_is_refused(
    table: CostTable, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({**table.to_json(), **change}), encoding="utf-8")
    with pytest.raises(UsageError, match="is no cost table") as caught:
        read_costs(file)
    assert said in caught.value.why


def test_a_table_of_another_pass_or_model_is_refused(view: ModelView, table: CostTable, tmp_path: Path) -> None:
    table.require(view, "torch", 1, 16, "costs.json")
    other = ModelView.open(write_tiny("gpt2", tmp_path / "other"))
    for asked, key in (
        ((view, "onnxruntime", 1, 16), "on"),
        ((view, "torch", 2, 16), "batch"),
        ((view, "torch", 1, 32), "tokens"),
        ((other, "torch", 1, 16), "model"),
    ):
        with pytest.raises(UsageError, match=f"another `{key}`"):
            table.require(*asked, "costs.json")


def recipe(*budgets: dict[str, Any], remove: str = "sublayers", **more: Any) -> dict[str, Any]:
    steps = [{"remove": remove, "by": {"score": "magnitude"}, "budget": given} for given in budgets]
    return {"schema": 1, "model": {"source": "model"}, "steps": steps, **more}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (recipe({"latency_ms": 9.0, "remove": 0.2}), "`remove` and `latency_ms` are both given"),
        (recipe({"remove": 0.2, "tokens": 64}), "`tokens` is about a latency that is not given"),
        (recipe({"latency_ms": 9.0, "of": "flops"}), "`of: flops` does not go with `latency_ms`"),
        (recipe({"latency_ms": 9.0}, remove="query_heads"), "does not go with `remove: query_heads`"),
        (recipe({"latency_ms": 9.0, "on": "onnxruntime"}), "`on: onnxruntime` needs the format onnx"),
        (recipe({"latency_ms": 9.0}, {"latency_ms": 8.0, "batch": 2}), "`batch` must be the same in all steps"),
        (recipe({"remove": 0.2}, expect={"latency_ms_max": 9.0}), "`latency_ms_max` needs a latency budget"),
        (recipe({"latency_ms": 0}), "latency_ms"),
    ],
    ids=["two", "lonely", "of", "heads", "onnx", "steps", "expect", "zero"],
)
def test_contradictions_are_found_before_any_work(data: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRecipeError, match=said):
        parse_recipe(data)


def test_the_defaults_of_a_pass_may_be_written_out() -> None:
    given = recipe({"latency_ms": 9.0}, {"latency_ms": 8.0, "on": "torch", "batch": 1, "tokens": 128})
    assert [step.budget.latency_ms for step in parse_recipe(given).steps] == [9.0, 8.0]
