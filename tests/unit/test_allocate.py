"""From scores and a budget to cuts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prunekit.core.errors import PlanError
from prunekit.core.recipe_model import Budget
from prunekit.core.rounding import n_keep, n_remove
from prunekit.plan.allocate import allocate
from prunekit.plan.budget import Scored, protected
from prunekit.plan.cost import cost, unit_cost
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from tests.tiny import FFN, write_tiny


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> ModelView:
    return ModelView.open(write_tiny("llama", tmp_path_factory.mktemp("llama")))


def plan_of(view: ModelView, kind: str, values: Callable[[int, int], float], **budget: Any) -> Plan:
    """Cuts for scores given as a function of (group, unit)."""
    scored = [
        Scored(group, [values(g, i) for i in range(len(group.units))]) for g, group in enumerate(view.groups(kind))
    ]
    return allocate(view, view, kind, scored, Budget(**budget))


def test_fractions_remove_at_least_what_they_say() -> None:
    assert (n_remove(30, 0.1), n_remove(60, 0.21), n_remove(10, 0.0)) == (3, 13, 0)
    assert (n_keep(11008, 0.25, 64), n_keep(1536, 0.125, 32), n_keep(10, 0.0, 3)) == (8256, 1344, 10)
    with pytest.raises(PlanError, match="too few"):
        n_keep(10, 0.5, 8)


def test_lowest_scores_go_and_ties_go_by_depth(view: ModelView) -> None:
    scores = (3.0, 1.0, 2.0, 1.0)
    assert plan_of(view, "blocks", lambda g, i: scores[i], units=1).drop == ("blocks.1.attention", "blocks.1.ffn")
    two = plan_of(view, "blocks", lambda g, i: scores[i], remove=0.5).drop
    assert [address for address in two if address.endswith("ffn")] == ["blocks.1.ffn", "blocks.3.ffn"]


def test_parameter_budget_takes_units_until_it_is_reached(view: ModelView) -> None:
    for remove in (0.1, 0.3, 0.6):
        plan = plan_of(view, "sublayers", lambda g, i: i, remove=remove, of="params")
        gone = cost(view).block_params - cost(view, plan).block_params
        last = unit_cost(view, plan.drop[-1], "params")
        assert gone >= 0.995 * remove * cost(view).block_params > gone - last


def test_alternating_takes_neighbours_by_the_sum_of_their_scores(view: ModelView) -> None:
    """Attention and FFN of four blocks in turn: units 3 and 4 are the FFN of block 1 and the attention of block 2."""
    scores = (9.0, 9.0, 1.5, 0.0, 1.0, 2.0, 9.0, 9.0)

    def dropped(**budget: Any) -> tuple[str, ...]:
        return plan_of(view, "sublayers", lambda g, i: scores[i], keep_alternating=True, **budget).drop

    assert dropped(units=2) == ("blocks.1.ffn", "blocks.2.attention")
    # Where those went, the attention of block 1 and the FFN of block 2 are neighbours.
    assert dropped(units=3) == ("blocks.1.attention", "blocks.1.ffn", "blocks.2.attention", "blocks.2.ffn")
    assert dropped(units=2, protect=("blocks.1.ffn", "blocks.2.ffn")) == ("blocks.0.ffn", "blocks.1.attention")
    with pytest.raises(PlanError, match="cannot be reached"):
        dropped(units=4, min_keep=6)


def test_protected_units_stay(view: ModelView) -> None:
    plan = plan_of(view, "blocks", lambda g, i: i, units=2, protect=("blocks.0.*", "blocks.2"))
    assert {address.split(".")[1] for address in plan.drop} == {"1", "3"}


def test_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="matches nothing"):
        protected(("blocks.7.*",), ("blocks.0.ffn", "blocks.1.ffn"))
    assert protected(("blocks.1",), ("blocks.0.ffn", "blocks.1.ffn", "blocks.10.ffn")) == {"blocks.1.ffn"}


def test_budget_out_of_reach_says_how_much_can_go(view: ModelView) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(view, "attention", lambda g, i: i, remove=0.9, of="params")
    assert "cannot be reached" in caught.value.what
    with pytest.raises(PlanError, match="leaves nothing"):
        plan_of(view, "blocks", lambda g, i: i, units=4)
    with pytest.raises(PlanError, match="cannot be reached"):
        plan_of(view, "blocks", lambda g, i: i, remove=0.5, min_keep=3)


def test_widths_inside_groups_stay_alike(view: ModelView) -> None:
    plan = plan_of(view, "neurons", lambda g, i: (i * (g + 3)) % 17, remove=0.3, within="group", multiple_of=8)
    kept = [plan.keep[f"blocks.{g}.ffn.neurons"] for g in range(4)]
    assert {len(k) for k in kept} == {32}
    for g, positions in enumerate(kept):
        gone = set(range(FFN)) - set(positions)
        assert max((i * (g + 3)) % 17 for i in gone) <= min((i * (g + 3)) % 17 for i in positions)


def test_parameter_budget_over_widths_is_a_share_of_all_blocks(view: ModelView) -> None:
    plan = plan_of(view, "neurons", lambda g, i: i, remove=0.2, of="params", within="group")
    gone = cost(view).block_params - cost(view, plan).block_params
    assert 0.2 <= gone / cost(view).block_params < 0.2 + 4 * unit_cost(view, "blocks.0.ffn.neurons.0", "params") / gone


def test_ranking_over_the_model_cuts_where_scores_are_low(view: ModelView) -> None:
    plan = plan_of(view, "neurons", lambda g, i: g, remove=0.4, within="model")
    assert len(plan.keep["blocks.0.ffn.neurons"]) == 1
    assert "blocks.3.ffn.neurons" not in plan.keep
    assert sum(FFN - len(k) for k in plan.keep.values()) >= n_remove(4 * FFN, 0.4)


def test_units_each_group_lose_are_counted(view: ModelView) -> None:
    plan = plan_of(view, "kv_groups", lambda g, i: -i, units=1, within="group")
    assert plan.keep == {f"blocks.{g}.attention.kv_groups": (0,) for g in range(4)}
