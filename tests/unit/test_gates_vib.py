"""Masks learned by vib: gates, choice, and short learnings of tiny models with real steps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit.core.errors import HealError, PlanError, StructureError
from prunekit.core.recipe_learn import Learn
from prunekit.gates._learn import Learned, Task, learn
from prunekit.gates._places import channel_units, places_of
from prunekit.heal.scene import Scene
from prunekit.plan.cost import cost, sublayer_cost
from prunekit.structure.view import ModelView
from tests.gating import gated, task_of
from tests.healing import SHORT, Bench, bench
from tests.tiny import BLOCKS, FFN, write_tiny

FAST_GATES = {"gate_lr": 0.3, "start": -3.0, "steps": 30, "check_every": 10, "schedule": "constant"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def view(llama: Bench) -> ModelView:
    return ModelView.open(llama.dense)


def scene_of(bench: Bench, **asked: Any) -> Scene:
    """The dense model as student and teacher."""
    budget = asked.pop("budget", {"remove": 0.3})
    settings = {"method": "vib", "data": str(bench.text), "remove": ["neurons", "kv_groups"], **SHORT, **asked}
    return replace(bench.scene(), asked=Learn.model_validate({**settings, "budget": budget}), student=bench.dense)


def learned(bench: Bench, work: Path, **asked: Any) -> Learned:
    scene = scene_of(bench, **asked)
    return learn(scene, whole_task(scene), work)


def whole_task(scene: Scene) -> Task:
    view, asked = ModelView.open(scene.student), scene.asked
    assert isinstance(asked, Learn)
    return Task(asked, view, sum(sublayer_cost(view, part, asked.budget.of) for part in view.sublayers))


def removed(view: ModelView, plan: Any) -> float:
    before, after = cost(view).block_params, cost(view, plan).block_params
    return (before - after) / before


def test_channels_know_their_units(view: ModelView) -> None:
    attention = view.sublayer("blocks.0.attention")
    sizes = {**view.sizes(attention), "kv": 2, "rep": 2, "hd": 1}
    assert channel_units(view.output(attention), "kv", sizes).tolist() == [0, 0, 1, 1]
    assert channel_units(view.output(attention), "rep", sizes).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("of", ["params", "flops"])
def test_soft_cost_of_whole_numbers_is_the_cost_of_the_plan(view: ModelView, of: str) -> None:
    from prunekit.gates._fold import plan_of

    task = task_of(view, ("neurons", "kv_groups", "query_heads", "sublayers"), of=of)
    keep = torch.rand(sum(len(p.units) for p in task.places), generator=torch.Generator().manual_seed(0)) < 0.6
    for place in task.places:
        keep[place.begin] = True if place.axis or place.address == "blocks.0.ffn" else keep[place.begin]
    after = cost(view, plan_of(task, keep))
    outer = view.head.shape[0] * view.head.shape[1] * 2 if view.head else 0
    expected = after.block_params if of == "params" else after.flops_per_token - outer
    assert float(task.costs.left(keep.double())) == expected


def test_rule_alone_decides_where_it_meets_the_budget(view: ModelView) -> None:
    task = task_of(view, ("neurons",), remove=0.2)
    n = BLOCKS * FFN
    quiet = math.ceil(0.2 * task.whole / (task.costs.before - float(task.costs.left(one_less(n)))))
    noise = torch.full((n,), -1.0)
    noise[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:quiet]] = 1.0
    chosen = task.chooser.choose(noise)
    assert chosen.threshold == 0
    assert (chosen.keep == (noise < 0)).all()


def one_less(n: int) -> torch.Tensor:
    kept = torch.ones(n, dtype=torch.float64)
    kept[0] = 0
    return kept


def test_budget_moves_the_threshold_and_keeps_multiples(view: ModelView) -> None:
    task = task_of(view, ("neurons", "kv_groups"), remove=0.25, multiple_of=8, protect=["blocks.2.*"])
    noise = torch.randn(sum(len(p.units) for p in task.places), generator=torch.Generator().manual_seed(3))
    chosen = task.chooser.choose(noise)
    assert 0.25 * 0.995 <= chosen.removed / task.whole < 0.35
    for place in task.places:
        kept = int(chosen.keep[place.slice].sum())
        assert kept == len(place.units) or place.kind != "neurons" or kept % 8 == 0
        assert kept == len(place.units) or not place.address.startswith("blocks.2.")
        stays, goes = noise[place.slice][chosen.keep[place.slice]], noise[place.slice][~chosen.keep[place.slice]]
        assert not len(goes) or float(stays.max()) <= float(goes.min())


def test_equal_widths_in_all_blocks(view: ModelView) -> None:
    task = task_of(view, ("neurons",), remove=0.3, within="group")
    chosen = task.chooser.choose(torch.randn(BLOCKS * FFN, generator=torch.Generator().manual_seed(1)))
    assert len({int(chosen.keep[place.slice].sum()) for place in task.places}) == 1


def test_budget_that_cannot_be_met_is_refused_before_training(llama: Bench, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be met") as caught:
        learned(llama, tmp_path / "w", remove=["kv_groups"], budget={"remove": 0.9})
    assert "can go" in caught.value.why
    assert not (tmp_path / "w").exists()


def test_information_is_the_closed_form(view: ModelView, llama: Bench) -> None:
    _, gates, _ = gated(llama.dense, task_of(view, ("neurons",)))
    mu, variance = gates.mu.detach().double(), gates.log_variance.detach().double().exp()
    # KL of N(mu, s2) to the best N(0, s2 + mu^2), as a numerical integral would give it.
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, variance.sqrt()), torch.distributions.Normal(0.0, (variance + mu**2).sqrt())
    ).sum()
    found = gates.information(torch.ones(len(mu))).detach()
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_factors_have_the_noise_that_they_say(view: ModelView, llama: Bench) -> None:
    task = task_of(view, ("neurons",))
    _, gates, _ = gated(llama.dense, task)
    gates.train()
    place = task.places[1]
    torch.manual_seed(0)
    drawn = gates.factors(place, torch.zeros(40, 500, FFN))
    assert drawn.shape == (40, 500, FFN)
    spread = (0.5 * gates.log_variance[place.slice]).exp()
    torch.testing.assert_close(drawn.mean((0, 1)), gates.mu[place.slice], atol=0.15, rtol=0)
    torch.testing.assert_close(drawn.std((0, 1)), spread, rtol=0.05, atol=0)


def test_learned_cut_meets_the_budget_and_beats_the_first_choice(llama: Bench, view: ModelView, tmp_path: Path) -> None:
    found = learned(llama, tmp_path / "w", **FAST_GATES)
    assert removed(view, found.plan) >= 0.3 * 0.995
    assert found.about["held_out_after"] < found.about["held_out_before"]
    assert found.about["removed"] == pytest.approx(removed(view, found.plan))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in found.tensors} <= {"down_proj", "o_proj"}


def test_soft_size_follows_the_target(llama: Bench, tmp_path: Path) -> None:
    asked = {"steps": 100, "check_every": 100, "held_out": 0.0, "gate_lr": 0.2, "start": -3.0}
    told = learned(llama, tmp_path / "w", remove=["neurons"], budget={"remove": 0.2}, **asked).about
    assert told["removed_by_rule"] == pytest.approx(0.2, abs=0.05)


def test_trained_weights_all_come_along(llama: Bench, view: ModelView, tmp_path: Path) -> None:
    found = learned(llama, tmp_path / "w", variant="full", **FAST_GATES)
    stays = {ref.name for part in view.sublayers if part.address not in found.plan.drop for ref in part.tensors}
    assert set(found.tensors) == stays | {ref.name for ref in view.outer}


def test_fast_learns_from_three_per_cent(llama: Bench, tmp_path: Path) -> None:
    told = learned(llama, tmp_path / "w", variant="fast", steps=2).about
    assert told["trained_sequences"] == SHORT["batch"]


def test_killed_learning_goes_on_to_the_same_masks(llama: Bench, tmp_path: Path) -> None:
    asked = {**FAST_GATES, "steps": 6, "check_every": 3, "schedule": "constant"}
    whole = learned(llama, tmp_path / "a", **asked)
    stopped = scene_of(llama, **asked)
    calls = []

    def talk(text: str) -> None:
        calls.append(text)
        if text.startswith("step 6"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(replace(stopped, talk=talk), whole_task(stopped), tmp_path / "b")
    again = learned(llama, tmp_path / "b", **asked)
    assert again.plan == whole.plan
    assert all(torch.equal(again.tensors[name], value) for name, value in whole.tensors.items())


def test_loss_that_is_no_number_stops(llama: Bench, tmp_path: Path) -> None:
    with pytest.raises(HealError, match="not a number") as caught:
        learned(llama, tmp_path / "w", **{**FAST_GATES, "gate_lr": 1e30})
    assert "`learn.gate_lr`" in caught.value.hint


def test_masks_that_are_no_numbers_are_not_said_to_miss_the_budget(llama: Bench, tmp_path: Path) -> None:
    with pytest.raises(HealError, match="is not a number at step 2") as caught:
        learned(llama, tmp_path / "w", gate_lr=1e30, warm_up=0.25)
    assert "lower `learn.gate_lr`" in caught.value.hint
    assert not (tmp_path / "w").exists()


def test_masks_that_are_no_numbers_are_noticed_without_a_held_out_part(llama: Bench, tmp_path: Path) -> None:
    with pytest.raises(HealError, match="doubt about a unit is not a number at step 2"):
        learned(llama, tmp_path / "w", gate_lr=1e30, warm_up=0.25, held_out=0.0, steps=2, check_every=2)
    assert not (tmp_path / "w").exists()


def test_sublayers_behind_a_norm_are_refused(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("gemma2", tmp_path / "dense"))
    with pytest.raises(StructureError, match="cannot be gated"):
        places_of(view, ("sublayers",))
