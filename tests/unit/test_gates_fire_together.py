"""Predictors that choose units for each input: what they learn from, what a model then computes, and what it saves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prunekit.core.errors import CheckpointError, HealError, PlanError, StructureError, UsageError
from prunekit.core.recipe_learn import Learn
from prunekit.gates._fire import Firing, by_count, by_mass
from prunekit.gates._learn import Learned, Task, check_dynamic, learn
from prunekit.heal.scene import Scene
from prunekit.modeling.dynamic import FILE, Predictor, choosing, dynamic, load_predictors, write_predictors
from prunekit.modeling.load import load_model
from prunekit.modeling.modeling_prunekit import blocks_of, output_projection
from prunekit.plan.cost import sublayer_cost
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.healing import Bench, bench
from tests.tiny import FFN, HEAD, HEADS, HIDDEN, tiny_model, write_tiny

EXACT = {"rtol": 1e-5, "atol": 1e-5}


class Fixed(Predictor):
    """Chooses the same units whatever it reads."""

    def __init__(self, fires: Tensor) -> None:
        super().__init__(HIDDEN, len(fires), 1)
        with torch.no_grad():
            self.down.weight.zero_()
            self.up.bias.copy_(torch.where(fires, 1.0, -1.0))


def fires(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.6


def masked(model: Any, kind: str, channels: dict[int, Tensor], begin: int) -> list[Any]:
    """Hooks that set what enters the output projections of blocks to 0, from a token on."""

    def hook(keep: Tensor, _: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given[0][:, begin:] = given[0][:, begin:] * keep
        return given

    from functools import partial

    blocks = blocks_of(model)
    return [
        output_projection(blocks[number], kind).register_forward_pre_hook(partial(hook, keep))
        for number, keep in channels.items()
    ]


def test_targets_are_the_units_that_answer_most() -> None:
    response = torch.tensor([[4.0, 1, 2, 3], [0, 9, 1, 0]])
    assert by_mass(response, 0.8).tolist() == [[True, False, False, True], [False, True, False, False]]
    assert by_mass(response, 1.0).tolist() == [[True] * 4] * 2
    assert by_count(response, 0.5).tolist() == [[True, False, False, True], [False, True, True, False]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen3"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_text_writers_compute_the_chosen_neurons_after_the_first_tokens(family: str, sequences: int) -> None:
    model = tiny_model(family, dtype=torch.float32).eval()
    ids = torch.arange(sequences * 12).view(sequences, 12) % 50 + 3
    keep = {1: fires(FFN, 1), 3: fires(FFN, 2)}
    with torch.no_grad():
        own = model(ids).logits
        hooks = masked(model, "ffn", keep, 4)
        expected = model(ids).logits
        for hook in hooks:
            hook.remove()
        with choosing(model, {f"blocks.{n}.ffn": Fixed(k) for n, k in keep.items()}, 4):
            found = model(ids).logits
        again = model(ids).logits
    torch.testing.assert_close(found, expected, **EXACT)
    assert float((expected - own).abs().max()) > 1e-3
    torch.testing.assert_close(again, own, rtol=0, atol=0)


@pytest.mark.parametrize("sequences", [1, 2])
def test_encoders_compute_the_chosen_neurons_and_heads(sequences: int) -> None:
    model = tiny_model("bert", dtype=torch.float32).eval()
    ids = torch.arange(sequences * 9).view(sequences, 9) % 50 + 3
    neurons, heads = fires(FFN, 3), torch.tensor([True, False, True, True])
    with torch.no_grad():
        own = model(input_ids=ids)[0]
        hooks = masked(model, "ffn", {0: neurons}, 0)
        hooks += masked(model, "attention", {2: heads.repeat_interleave(HEAD)}, 0)
        expected = model(input_ids=ids)[0]
        for hook in hooks:
            hook.remove()
        with choosing(model, {"blocks.0.ffn": Fixed(neurons), "blocks.2.attention": Fixed(heads)}, 0):
            found = model(input_ids=ids)[0]
    assert len(heads) == HEADS
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(model(input_ids=ids)[0], own, rtol=0, atol=0)


def learnable(seed: int) -> Predictor:
    torch.manual_seed(seed)
    return Predictor(HIDDEN, FFN, 8).requires_grad_(False)


def test_choice_depends_on_the_input_and_holds_over_the_cache() -> None:
    model = tiny_model("llama", dtype=torch.float32).eval()
    predictors = {f"blocks.{n}.ffn": learnable(n) for n in range(4)}
    first, second = (torch.randint(3, 64, (1, 7), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    chosen: list[Tensor] = []
    predictors["blocks.0.ffn"].register_forward_hook(lambda _, __, found: chosen.append(found > 0))
    with torch.no_grad(), choosing(model, predictors, 4):
        written = model.generate(first, max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert all(bool((each == chosen[0]).all()) for each in chosen)
        chosen.clear()
        # One pass over everything chooses from the same first tokens, and gives what the steps gave.
        whole = model(written).logits[0, 6:-1].argmax(-1)
        assert written[0, 7:].tolist() == whole.tolist()
        mine = chosen[0]
        model(second)
        assert not bool((chosen[-1] == mine).all())


def test_work_of_units_left_out_is_not_done() -> None:
    model = tiny_model("llama", dtype=torch.float32).eval()
    ids, keep = torch.arange(20)[None] + 3, torch.arange(FFN) < FFN // 4

    def flops() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids)
        return int(counter.get_total_flops())

    dense = flops()
    with choosing(model, {f"blocks.{n}.ffn": Fixed(keep) for n in range(4)}, 4):
        ours = flops()
    # 16 of 20 tokens pass 3 matrices without 3/4 of the neurons, in 4 blocks; the predictors cost a little.
    saved = 4 * 16 * 2 * 3 * HIDDEN * (FFN - FFN // 4)
    predictors = 4 * 2 * 2 * (HIDDEN + FFN)
    assert dense - saved <= ours <= dense - saved + predictors


def test_a_unit_stays_where_none_is_expected() -> None:
    model = tiny_model("llama", dtype=torch.float32).eval()
    with torch.no_grad(), choosing(model, {"blocks.0.ffn": Fixed(torch.zeros(FFN, dtype=torch.bool))}, 1):
        assert bool(model(torch.arange(6)[None]).logits.isfinite().all())


@pytest.mark.parametrize(
    ("family", "kind", "decoder"),
    [("llama", "attention", True), ("opt", "ffn", True), ("modernbert", "attention", False)],
)
def test_sublayers_that_cannot_choose_are_refused(family: str, kind: str, decoder: bool) -> None:
    model = tiny_model(family, dtype=torch.float32)
    with (
        pytest.raises(StructureError, match="cannot be chosen for each input"),
        choosing(model, {f"blocks.1.{kind}": learnable(0)}, int(decoder)),
    ):
        pass


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("llama"))


def scene_of(setting: Bench, decoder: bool = True, **asked: Any) -> Scene:
    given = {
        "method": "fire_together", "remove": ["neurons"], "budget": {"remove": 0.3}, "data": str(setting.text),
        "steps": 30, "batch": 8, "length_tokens": 16, "sequences": 80, "check_every": 15, "held_out": 0.2,
        **({"tokens": 6} if decoder else {}), **asked,
    }  # fmt: skip
    scene = setting.scene(decoder)
    return replace(scene, asked=Learn.model_validate(given), student=setting.dense)


def learned(setting: Bench, work: Path, decoder: bool = True, **asked: Any) -> Learned:
    scene = scene_of(setting, decoder, **asked)
    view = ModelView.open(setting.dense)
    assert isinstance(scene.asked, Learn)
    whole = sum(sublayer_cost(view, part, "params") for part in view.sublayers)
    return learn(scene, Task(scene.asked, view, whole), work)


@pytest.mark.parametrize("targets", ["mass", "uniform"])
def test_predictors_learn_what_fires_within_the_budget(llama: Bench, tmp_path: Path, targets: str) -> None:
    found = learned(llama, tmp_path / "w", targets=targets, predictor_lr=0.03)
    about = found.about
    assert about["held_out_after"] < 0.9 * about["held_out_before"]
    assert about["removed_by_targets"] == pytest.approx(0.3, abs=0.03)
    assert about["removed"] == pytest.approx(0.3, abs=0.08)
    assert about["foretold"] > 0.7
    assert not found.tensors
    assert not found.plan.drop
    assert not found.plan.keep
    assert {name.rpartition(".")[0].rpartition(".")[0] for name in found.predictors} == {
        f"blocks.{n}.ffn" for n in range(4)
    }


def test_foretold_units_lose_less_than_others(llama: Bench, tmp_path: Path) -> None:
    found = learned(llama, tmp_path / "w", predictor_lr=0.03)
    model = load_model(llama.dense)
    write_tiny("llama", tmp_path / "o", dtype=torch.float32)
    write_predictors(tmp_path / "o", found.predictors, {"tokens": 6})
    loaded = load_predictors(tmp_path / "o")
    assert loaded is not None
    predictors, tokens = loaded
    assert tokens == 6
    from prunekit.calibrate.batches import token_batch
    from tests.healing import Characters

    ids = token_batch(Characters(), str(llama.text), 20, 16)
    with torch.no_grad():
        own = model(ids).logits

        def error() -> float:
            return float((model(ids).logits - own)[:, 6:].square().mean())

        with choosing(model, predictors, tokens):
            ours = error()
        others = {address: Fixed(fires(FFN, n)) for n, address in enumerate(predictors)}
        with choosing(model, others, tokens):
            random = error()
    assert ours < 0.5 * random


def test_encoder_predicts_heads_and_neurons(tmp_path: Path) -> None:
    setting = bench(tmp_path / "b", "bert", drop=("blocks.1.attention", "blocks.2.ffn"))
    found = learned(setting, tmp_path / "w", decoder=False, remove=["neurons", "kv_groups"], budget={"remove": 0.25},
                    sequences=40)  # fmt: skip
    assert {name.split(".")[2] for name in found.predictors} == {"ffn", "attention"}
    assert found.about["tokens_first"] == 0
    assert found.about["removed"] == pytest.approx(0.25, abs=0.08)
    assert found.about["foretold"] > 0.8


def test_killed_learning_goes_on_to_the_same_predictors(llama: Bench, tmp_path: Path) -> None:
    whole = learned(llama, tmp_path / "whole", steps=8, check_every=2)
    scene = scene_of(llama, steps=8, check_every=2)
    view = ModelView.open(llama.dense)
    assert isinstance(scene.asked, Learn)
    task = Task(scene.asked, view, sum(sublayer_cost(view, part, "params") for part in view.sublayers))

    def stop(text: str) -> None:
        if "step 6" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(replace(scene, talk=stop), task, tmp_path / "w")
    again = learn(scene, task, tmp_path / "w")
    for name, value in whole.predictors.items():
        torch.testing.assert_close(again.predictors[name], value, rtol=0, atol=1e-6)


def test_what_cannot_be_learned_is_refused_before_training(llama: Bench, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave none after the first 16"):
        learned(llama, tmp_path / "w", tokens=16)
    with pytest.raises(PlanError, match="budget of `learn` cannot be met"):
        learned(llama, tmp_path / "w", budget={"remove": 0.95})
    with pytest.raises(StructureError, match="cannot be chosen for each input") as caught:
        learned(llama, tmp_path / "w", remove=["kv_groups"], budget={"remove": 0.1})
    assert "KV cache" in caught.value.why
    with pytest.raises(UsageError, match="`multiple_of` of the budget"):
        check_dynamic(scene_of(llama, budget={"remove": 0.1, "multiple_of": 8}).asked)
    assert not (tmp_path / "w").exists()


def test_damaged_predictors_are_named(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path / "o", dtype=torch.float32)
    tensors = {f"blocks.1.ffn.{name}": value for name, value in learnable(0).state_dict().items()}
    write_predictors(folder, tensors, {"tokens": 4})
    section = json.loads((folder / "config.json").read_text())["prunekit"]["dynamic"]
    assert section == {"tokens": 4, "file": FILE.as_posix(), "sub_layers": ["blocks.1.ffn"]}
    # A loader that knows nothing of it has the dense model.
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(9)[None]
    with torch.no_grad(), dynamic(load_model(folder), folder) as model:
        assert not torch.allclose(model(ids).logits, stock(ids).logits)
    torch.testing.assert_close(load_model(folder)(ids).logits, stock(ids).logits)
    # What is cut from it has none.
    view = ModelView.open(folder)
    (tmp_path / "cut").mkdir()
    engine.apply(view, Plan.make(view, ["blocks.2.attention", "blocks.2.ffn"]), tmp_path / "cut")
    assert load_predictors(tmp_path / "cut") is None
    assert "prunekit" not in json.loads((tmp_path / "cut" / "config.json").read_text())
    (folder / FILE).write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"predictors of .* cannot be loaded"):
        load_predictors(folder)


def test_numbers_that_are_none_stop(llama: Bench, tmp_path: Path) -> None:
    with pytest.raises(HealError, match="is not a number at step") as caught:
        learned(llama, tmp_path / "w", predictor_lr=1e30, steps=40)
    assert "lower `learn.predictor_lr`" in caught.value.hint


def test_gates_are_the_whole_loss() -> None:
    assert Firing.hidden_states is False
    assert Firing.teacher is None
