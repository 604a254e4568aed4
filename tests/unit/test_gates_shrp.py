"""Heads chosen by shrp: routing, usage, the shared expander, and short learnings of tiny encoders with real steps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit.core.errors import HealError, PlanError, UsageError
from prunekit.core.recipe_learn import Learn
from prunekit.gates._learn import Learned, Task, check, learn
from prunekit.gates._shrp import Routers, _pooled, _Shared
from prunekit.gates.shrp import Loss, Shrp
from prunekit.heal.scene import Scene
from prunekit.modeling.load import load_model
from prunekit.plan.cost import cost
from prunekit.structure.view import ModelView
from tests.gating import task_of
from tests.healing import SHORT, Bench, bench
from tests.tiny import BLOCKS, HEADS

# Three of the four heads of every block are 41.9 % of the blocks' parameters.
MOST = {"remove": 0.415}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def view(bert: Bench) -> ModelView:
    return ModelView.open(bert.dense)


def routers(view: ModelView, budget: dict[str, Any] = MOST, **knobs: Any) -> Routers:
    return Shrp(**knobs).gates(task_of(view, ("kv_groups",), **budget))


def scene_of(bench: Bench, **asked: Any) -> Scene:
    """The dense model as student and teacher."""
    budget = asked.pop("budget", MOST)
    settings = {"method": "shrp", "data": str(bench.text), "remove": ["kv_groups"], **SHORT, **asked}
    learning = Learn.model_validate({**settings, "budget": budget})
    return replace(bench.scene(decoder=False), asked=learning, student=bench.dense)


def whole_task(scene: Scene) -> Task:
    view, asked = ModelView.open(scene.student), scene.asked
    assert isinstance(asked, Learn)
    return Task(asked, view, cost(view).block_params)


def learned(bench: Bench, work: Path, **asked: Any) -> Learned:
    scene = scene_of(bench, **asked)
    return learn(scene, whole_task(scene), work)


def ids(batch: int = 6, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("top", [1, 3])
def test_each_sequence_takes_so_many_heads(bert: Bench, view: ModelView, top: int) -> None:
    gates = routers(view, top=top)
    model = load_model(bert.dense)
    gates.attach(model, view)
    gates.fade = 1.0
    model.train()(input_ids=ids())
    assert gates.usage.view(BLOCKS, HEADS).sum(1).tolist() == [6.0 * top] * BLOCKS
    torch.testing.assert_close(gates.chance.view(BLOCKS, HEADS).sum(1), torch.full((BLOCKS,), 6.0))


def test_heads_that_are_not_taken_fade(view: ModelView) -> None:
    gates = routers(view, top=1)
    place = gates._places[0]
    for fade, low in ((0.0, 1.0), (0.25, 0.75), (1.0, 0.0)):
        gates.fade = fade
        gates._route(place, None, (torch.randn(5, 7, view.hidden),), {})
        factors = gates.factors(place, torch.zeros(1))
        assert factors.shape == (5, 1, HEADS)
        torch.testing.assert_close(factors.sum(-1), torch.full((5, 1), 1 + low * (HEADS - 1)))
        torch.testing.assert_close(factors.amax(-1), torch.ones(5, 1))


def test_protected_heads_are_always_there(bert: Bench, view: ModelView) -> None:
    gates = routers(view, {"remove": 0.15, "protect": ["blocks.1.*", "blocks.2.attention.kv_groups.3"]}, top=1)
    place = gates._places[2]
    gates.fade = 1.0
    gates._route(place, None, (torch.randn(5, 7, view.hidden),), {})
    assert gates.factors(place, torch.zeros(1))[..., 3].tolist() == [[1.0]] * 5
    gates.forget()
    model = load_model(bert.dense)
    gates.attach(model, view)
    model.train()(input_ids=ids())
    assert gates.usage.view(BLOCKS, HEADS).sum(1).tolist() == [6.0, 0.0, 6.0, 6.0]


def test_router_learns_which_head_would_help(view: ModelView) -> None:
    gates = routers(view, top=1)
    gates.fade = 1.0
    place = gates._places[0]
    gates._route(place, None, (torch.randn(32, 7, view.hidden),), {})
    # A loss that falls with the factor of head 2, taken or not.
    (-gates.factors(place, torch.zeros(1))[..., 2].sum()).backward()
    entered = torch.randn(64, 7, view.hidden)
    before = chances(gates, entered)[2]
    with torch.no_grad():
        gates.weight -= 0.1 * gates.weight.grad
    assert chances(gates, entered)[2] > before + 0.01


def chances(gates: Routers, entered: torch.Tensor) -> torch.Tensor:
    """Mean probability of each head of the first block."""
    gates.forget()
    gates._route(gates._places[0], None, (entered,), {})
    return gates.chance[gates._places[0].slice] / len(entered)


def test_padding_moves_no_route(bert: Bench, view: ModelView) -> None:
    found = []
    for padding in (0, 4):
        gates, model = routers(view, top=1), load_model(bert.dense)
        gates.attach(model, view)
        given = torch.nn.functional.pad(ids(), (0, padding))
        model(input_ids=given, attention_mask=(given != 0).long())
        found.append(gates.chance.clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    states = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert _pooled(states, torch.tensor([[1, 1, 0]])).tolist() == [[2.0]]
    assert _pooled(states[:, :2], None).tolist() == [[2.0]]


def test_balance_is_one_where_heads_are_taken_alike(view: ModelView) -> None:
    gates = routers(view, top=1)
    place = gates._places[0]
    d = view.hidden
    with torch.no_grad():
        # Each sequence is one of four unit vectors, and each router row wants one of them.
        gates.weight[place.slice] = 50 * torch.eye(HEADS, d)
    alike = torch.eye(HEADS, d)[:, None, :].repeat(3, 2, 1)
    gates._route(place, None, (alike,), {})
    assert gates.imbalance().item() == pytest.approx(1.0, abs=1e-3)
    gates._route(place, None, (alike[:1].repeat(8, 1, 1),), {})
    assert gates.imbalance().item() == pytest.approx(HEADS, abs=1e-2)


def test_balance_ends_and_usage_begins_with_the_second_stage(view: ModelView) -> None:
    gates = routers(view)
    loss = Loss(Shrp(balanced=0.5, balance=0.3), gates, steps=8)
    told = []
    for step in range(8):
        loss.at_step(step)
        told.append((round(gates.fade, 2), loss.weight, float(gates.usage.sum())))
        gates.usage += 1
    n = len(gates.usage)
    assert told[:4] == [(0.25, 0.3, 0), (0.5, 0.3, n), (0.75, 0.3, 2 * n), (1.0, 0.3, 3 * n)]
    assert told[4:] == [(1.0, 0.0, 0), (1.0, 0.0, n), (1.0, 0.0, 2 * n), (1.0, 0.0, 3 * n)]


def test_most_used_heads_stay(view: ModelView) -> None:
    gates = routers(view, top=1)
    gates.usage.copy_(torch.tensor([9, 1, 0, 0, 0, 8, 2, 0, 3, 3, 4, 0, 0, 0, 0, 10]).float())
    # Heads that nobody took are told apart by their probabilities.
    gates.chance.copy_(torch.linspace(1, 2, 16))
    gates.eval()
    assert gates.chosen is not None
    assert gates.chosen.threshold == 0
    assert gates.chosen.keep.nonzero().flatten().tolist() == [0, 5, 10, 15]
    assert (gates.doubt() < 0).nonzero().flatten().tolist() == [0, 5, 10, 15]


def test_budget_leaves_more_heads_than_are_taken_by_usage(view: ModelView) -> None:
    gates = routers(view, {"remove": 0.3}, top=1)
    gates.usage.copy_(torch.tensor([9, 1, 0, 0, 0, 8, 2, 0, 3, 3, 4, 0, 0, 0, 0, 10]).float())
    gates.eval()
    assert gates.chosen is not None
    stays = set(gates.chosen.keep.nonzero().flatten().tolist())
    assert {0, 5, 8, 9, 10, 15} <= stays
    assert gates.chosen.threshold > 0


@pytest.mark.parametrize(("remove", "top"), [(0.415, 1), (0.27, 2), (0.13, 3)])
def test_budget_says_how_many_heads_are_taken(view: ModelView, remove: float, top: int) -> None:
    assert routers(view, {"remove": remove}).top == top


def test_shared_expander_begins_as_the_nearest_of_its_rank() -> None:
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    form = _Shared(4)
    up, inner = form.right_inverse(weight)
    assert up.shape == (12, 4)
    left, values, right = torch.linalg.svd(weight)
    torch.testing.assert_close(form(up, inner), left[:, :4] * values[:4] @ right[:4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("expander", ["own", "shared"])
def test_learned_cut_meets_the_budget_with_trained_weights(
    bert: Bench, view: ModelView, tmp_path: Path, expander: str
) -> None:
    found = learned(bert, tmp_path / "w", expander=expander, steps=20, check_every=5)
    assert {len(units) for units in found.plan.keep.values()} == {1}
    assert found.about["removed"] >= 0.415 * 0.995
    assert found.about["held_out_after"] < found.about["held_out_before"]
    assert set(found.tensors) == {ref.name for part in view.sublayers for ref in part.tensors} | {
        ref.name for ref in view.outer if ref.name in found.tensors
    }
    head = view.widths["attention"]["hd"]
    assert found.tensors["encoder.layer.0.attention.output.dense.weight"].shape == (view.hidden, head)


@pytest.mark.parametrize("expander", ["own", "shared"])
def test_killed_learning_goes_on_to_the_same_heads(bert: Bench, tmp_path: Path, expander: str) -> None:
    asked = {"steps": 6, "check_every": 3, "expander": expander}
    whole = learned(bert, tmp_path / "a", **asked)
    stopped = scene_of(bert, **asked)

    def talk(text: str) -> None:
        if text.startswith("step 6"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(replace(stopped, talk=talk), whole_task(stopped), tmp_path / "b")
    again = learned(bert, tmp_path / "b", **asked)
    assert again.plan == whole.plan
    assert all(torch.equal(again.tensors[name], value) for name, value in whole.tensors.items())


def test_loss_that_is_no_number_stops(bert: Bench, tmp_path: Path) -> None:
    with pytest.raises(HealError, match="not a number") as caught:
        learned(bert, tmp_path / "w", lr=1e30)
    assert "`learn.router_lr`" in caught.value.hint


def test_budget_out_of_reach_is_refused_before_training(bert: Bench, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be met"):
        learned(bert, tmp_path / "w", budget={"remove": 0.6})
    assert not (tmp_path / "w").exists()


def test_model_that_writes_text_is_refused(bert: Bench) -> None:
    asked = scene_of(bert).asked
    assert isinstance(asked, Learn)
    with pytest.raises(UsageError, match="needs a text encoder") as caught:
        check(asked, decoder=True)
    assert "vib" in caught.value.hint


def test_more_heads_than_there_are_is_refused(view: ModelView) -> None:
    with pytest.raises(UsageError, match=r"`learn.top: 5` exceeds the 4 heads"):
        routers(view, top=5)


def test_no_head_goes_by_the_rule_where_every_sequence_takes_all(view: ModelView) -> None:
    gates = routers(view, top=HEADS)
    gates.usage.fill_(6)
    gates.chance.copy_(torch.linspace(1, 2, 16))
    assert (gates.doubt() < 0).all()
    # What the budget takes is still chosen by probability.
    gates.eval()
    assert gates.chosen is not None
    assert gates.chosen.keep.nonzero().flatten().tolist() == [3, 7, 11, 15]


def test_doubt_is_finite_before_anything_is_counted(view: ModelView) -> None:
    assert all(map(math.isfinite, routers(view).doubt().tolist()))
