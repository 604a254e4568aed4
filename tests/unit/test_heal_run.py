"""Healing of tiny models with real steps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prunekit.core.errors import HealError, UsageError
from prunekit.heal import _lora
from prunekit.heal._data import gather
from prunekit.heal.run import check, heal
from prunekit.heal.scene import require_same_vocabulary
from prunekit.modeling.load import load_model
from tests.healing import DROP, Bench, Characters, bench, without_teacher
from tests.tiny import tiny_inputs, tiny_model

# Sums in another order, after four steps of Adam, which turns noise in a gradient near zero into a small step.
NOISE = {"rtol": 0.0, "atol": 2e-5}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("llama"))


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_distillation_brings_the_divergence_down(llama: Bench, tmp_path: Path) -> None:
    healed = heal(llama.scene(steps=30, check_every=10), tmp_path / "w")
    told = healed.about
    assert told["steps_done"] == 30
    assert told["held_out_after"] < 0.5 * told["held_out_before"]
    # What the Trainer saw is what the model gives now.
    data = gather(llama.scene(steps=30))
    from prunekit.heal._losses import kl

    ids = data.inputs["input_ids"][data.held_out]
    with torch.no_grad():
        now = kl(healed.model(ids).logits, load_model(llama.dense)(ids).logits, 1.0)
    assert float(now) == pytest.approx(told["held_out_after"], rel=1e-4)


def test_selection_keeps_the_easiest_of_what_was_drawn(llama: Bench) -> None:
    from prunekit.datasets.encoder import surprises
    from prunekit.pipeline.inputs import chooser

    asked = {"sequences": 12, "held_out": 0.0, "batch": 4, "select": {"metric": "loss", "keep": 0.5, "rule": "easy"}}
    told: list[str] = []
    scene = llama.scene(**asked)
    scene = replace(scene, choose=chooser(scene.asked.select, scene.load_teacher, 0, told.append))
    kept = gather(scene).inputs["input_ids"]
    drawn = gather(llama.scene(**{**asked, "sequences": 24, "select": None})).inputs["input_ids"]
    losses = surprises(load_model(llama.dense), {"input_ids": drawn})[:, 0]
    assert {tuple(row) for row in kept.tolist()} == {tuple(row) for row in drawn[losses.argsort()[:12]].tolist()}
    assert told == ["12 of 24 sequences stay, the easy ones by loss: asked for"]


def test_selection_needs_more_text_than_it_keeps(llama: Bench) -> None:
    n = len(gather(llama.scene(sequences=None, steps=1000)).inputs["input_ids"])
    with pytest.raises(UsageError, match=f"too short for {n} sequences") as raised:
        gather(llama.scene(sequences=n, select={"metric": "loss", "keep": 0.5}))
    assert f"makes {n // 2} with `select.keep: 0.5`" in raised.value.why


def test_finetuning_brings_the_cross_entropy_down(llama: Bench, tmp_path: Path) -> None:
    told = heal(without_teacher(llama.scene(method="finetune", steps=20, check_every=20)), tmp_path / "w").about
    assert told["held_out_after"] < told["held_out_before"] - 0.1


def test_cache_of_the_whole_vocabulary_gives_what_the_teacher_in_memory_gives(llama: Bench, tmp_path: Path) -> None:
    online = heal(llama.scene(cross_entropy=0.25), tmp_path / "a").about
    asked = llama.scene(cross_entropy=0.25, top_k=64)
    cached = heal(asked, tmp_path / "b").about
    # float16 keeps 11 bits of a log probability.
    assert cached["held_out_before"] == pytest.approx(online["held_out_before"], rel=1e-3)
    assert cached["held_out_after"] == pytest.approx(online["held_out_after"], rel=1e-3)
    again = heal(without_teacher(asked), tmp_path / "c").about
    assert again["held_out_after"] == cached["held_out_after"]


def test_damaged_cache_is_made_again(llama: Bench, tmp_path: Path) -> None:
    scene = replace(llama.scene(top_k=4), cache=tmp_path / "cache")
    first = heal(scene, tmp_path / "a").about
    (part,) = (tmp_path / "cache").glob("heal/tokens-*/part-*.safetensors")
    part.write_bytes(part.read_bytes()[:-8])
    assert heal(scene, tmp_path / "b").about["held_out_after"] == first["held_out_after"]


def test_block_outputs_can_be_matched(llama: Bench, tmp_path: Path) -> None:
    told = heal(llama.scene(hidden=1.0, steps=20, check_every=20), tmp_path / "w").about
    plain = heal(llama.scene(steps=2), tmp_path / "v").about
    assert told["held_out_before"] > plain["held_out_before"]
    assert told["held_out_after"] < 0.8 * told["held_out_before"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_attention_relations_are_learned_and_attention_is_put_back(tmp_path: Path, family: str) -> None:
    decoder = family != "bert"
    drop = DROP if family == "llama" else ("blocks.1.attention", "blocks.1.ffn")
    made = bench(tmp_path, family, drop=drop)
    teacher = load_model(made.dense)
    own = teacher.config._attn_implementation
    scene = replace(made.scene(decoder, relations=100.0, steps=40, check_every=40), load_teacher=lambda: teacher)
    healed = heal(scene, tmp_path / "w")
    # Without relations the loss before training is below 1.
    assert healed.about["held_out_before"] > 3
    assert healed.about["held_out_after"] < 0.8 * healed.about["held_out_before"]
    assert teacher.config._attn_implementation == healed.model.config._attn_implementation == own


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"attention": "subsampled", "length_tokens": 16}, "`heal.attention`"), ({"compile": True}, "`heal.compile`")],
    ids=["attention", "compile"],
)
def test_relations_of_another_attention_are_refused(llama: Bench, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"`heal.relations` does not go with {words}"):
        check(llama.scene(relations=1.0, **asked).asked, decoder=True)


def test_passes_of_a_step_add_up_to_the_step(llama: Bench, tmp_path: Path) -> None:
    whole = weights(heal(llama.scene(), tmp_path / "a").model)
    parts = weights(heal(llama.scene(accumulate=4), tmp_path / "b").model)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, **NOISE)


def test_passes_of_sentences_add_up_whatever_their_lengths(tmp_path: Path) -> None:
    made = bench(tmp_path, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    lines = (
        "one two three four five six seven eight" + " nine" * (i % 5) if i % 2 else "a b c d e f g h" for i in range(80)
    )
    made.text.write_text("\n".join(lines))
    asked = {"decoder": False, "length_tokens": 60}
    one, four = (heal(made.scene(accumulate=n, **asked), tmp_path / str(n)) for n in (1, 4))
    # Five rows are held out, in batches of four and one, or one by one.
    for name in ("held_out_before", "held_out_after"):
        assert four.about[name] == pytest.approx(one.about[name], rel=1e-5)
    whole, parts = weights(one.model), weights(four.model)
    # A bias of the keys changes no attention, so that its gradient is noise.
    for name in (name for name in whole if "key.bias" not in name):
        torch.testing.assert_close(parts[name], whole[name], **NOISE)


def interrupted(bench: Bench, work: Path, at: str, **asked: Any) -> None:
    """A healing that is stopped when it talks of a certain step."""

    def talk(text: str) -> None:
        if at in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(replace(bench.scene(**asked), talk=talk), work)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_interrupted_training_goes_on_to_the_same_weights(llama: Bench, tmp_path: Path, train: str) -> None:
    if train == "lora":
        pytest.importorskip("peft")
    asked = {"steps": 8, "train": train}
    whole = heal(llama.scene(**asked), tmp_path / "whole")
    interrupted(llama, tmp_path / "w", "step 6", **asked)
    assert sorted(p.name for p in (tmp_path / "w").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    said: list[str] = []
    again = heal(replace(llama.scene(**asked), talk=said.append), tmp_path / "w")
    assert said[0] == "going on from step 4 of 8"
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(again.model)[name], value, rtol=0, atol=1e-7)
    assert again.about["held_out_before"] == whole.about["held_out_before"]
    assert again.about["held_out_after"] == pytest.approx(whole.about["held_out_after"], abs=1e-6)


def test_training_that_was_done_is_not_done_again(llama: Bench, tmp_path: Path) -> None:
    """As after a kill between the last step and the output."""
    first = weights(heal(llama.scene(), tmp_path / "w").model)
    again = heal(llama.scene(), tmp_path / "w")
    assert again.about["steps_done"] == 4
    for name, value in weights(again.model).items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=0)


ENDED: list[tuple[str, dict[str, Any]]] = [
    # 16 rows make epochs of 4 steps.
    ("steps", {"steps": 3, "check_every": 3, "held_out": 0.0}),
    ("patience", {"steps": 40, "lr": 1e-12, "patience": 2}),
    ("minutes", {"steps": 4000, "minutes": 1e-6, "check_every": 1000}),
]


@pytest.mark.parametrize(("by", "asked"), ENDED, ids=[entry[0] for entry in ENDED])
def test_training_that_ended_is_not_gone_on_with(llama: Bench, tmp_path: Path, by: str, asked: dict[str, Any]) -> None:
    first = heal(llama.scene(**asked), tmp_path / "w")
    again = heal(llama.scene(**asked), tmp_path / "w")
    assert again.about == first.about
    assert again.about["stopped_by"] == by
    for name, value in weights(again.model).items():
        torch.testing.assert_close(value, weights(first.model)[name], rtol=0, atol=0)


def test_patience_counts_on_after_a_kill(llama: Bench, tmp_path: Path) -> None:
    asked = {"steps": 40, "lr": 1e-12, "patience": 4}
    whole = heal(llama.scene(**asked), tmp_path / "whole").about
    interrupted(llama, tmp_path / "w", "step 6 ", **asked)
    assert heal(llama.scene(**asked), tmp_path / "w").about["steps_done"] == whole["steps_done"]


def test_best_state_is_found_from_another_folder(llama: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"steps": 12, "lr": 1.0, "warm_up": 0.9}
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    first = heal(llama.scene(**asked), Path("w"))
    assert first.about["best_step"] < 12
    monkeypatch.chdir(tmp_path / "below")
    again = weights(heal(llama.scene(**asked), Path("../w")).model)
    for name, value in weights(first.model).items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


def test_damage_to_the_best_checkpoint_is_named_too(llama: Bench, tmp_path: Path) -> None:
    work, asked = tmp_path / "w", {"steps": 12, "lr": 1.0, "warm_up": 0.9}
    interrupted(llama, work, "step 10 ", **asked)
    best = min(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    (best / "model.safetensors").write_bytes(b"short")
    with pytest.raises(HealError, match=f"{best.name}` is damaged") as caught:
        heal(llama.scene(**asked), work)
    assert "the best one so far" in caught.value.hint
    assert best.is_dir()


def test_checkpoint_that_was_not_finished_is_ignored(llama: Bench, tmp_path: Path) -> None:
    work = tmp_path / "w"
    interrupted(llama, work, "step 4")
    (work / "checkpoint-3").mkdir()
    (work / "checkpoint-3" / "model.safetensors").write_bytes(b"half")
    assert heal(llama.scene(), work).about["steps_done"] == 4


def test_damaged_checkpoint_is_named(llama: Bench, tmp_path: Path) -> None:
    work = tmp_path / "w"
    interrupted(llama, work, "step 4")
    file = work / "checkpoint-2" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-9] + b"corrupted")
    with pytest.raises(HealError, match="checkpoint-2` is damaged") as caught:
        heal(llama.scene(), work)
    assert "optimizer.pt" in caught.value.why
    assert file.is_file()


def test_training_of_other_settings_is_not_gone_on_with(llama: Bench, tmp_path: Path) -> None:
    work = tmp_path / "w"
    interrupted(llama, work, "step 4")
    with pytest.raises(HealError, match="of another kind") as caught:
        heal(llama.scene(lr=1e-5, patience=3), work)
    assert "`lr` was 0.003, is 1e-05" in caught.value.why
    assert "`patience` was None, is 3" in caught.value.why
    assert (work / "checkpoint-2").is_dir()


def test_training_that_reached_nothing_leaves_nothing(llama: Bench, tmp_path: Path) -> None:
    interrupted(llama, tmp_path / "w", "step 0")
    assert not (tmp_path / "w").exists()


def test_loss_that_is_no_number_stops_and_keeps_the_last_good_state(llama: Bench, tmp_path: Path) -> None:
    scene, work = llama.scene(method="finetune", steps=40, check_every=1, lr=1e9, max_grad_norm=1e30), tmp_path / "w"
    with pytest.raises(HealError, match="is not a number at step") as caught:
        heal(replace(scene, asked=scene.asked.model_copy(update={"warm_up": 0.9})), work)
    assert "lower `heal.lr`" in caught.value.hint
    good = max(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert good.name in caught.value.why
    assert all(bool(value.isfinite().all()) for value in load_file(good / "model.safetensors").values())


def test_weights_that_are_no_numbers_are_no_good_state(llama: Bench, tmp_path: Path) -> None:
    asked = {"method": "finetune", "steps": 9, "check_every": 1, "lr": 1e38, "max_grad_norm": 1e30, "warm_up": 0.0}
    with pytest.raises(HealError, match="norm of the weights is not a number at step 1") as caught:
        heal(llama.scene(held_out=0.0, **asked), tmp_path / "w")
    assert "last good state" not in caught.value.why
    assert not (tmp_path / "w").exists()


def test_training_stops_when_the_held_out_part_gets_no_better(llama: Bench, tmp_path: Path) -> None:
    told = heal(llama.scene(steps=40, lr=1e-12, patience=1), tmp_path / "w").about
    assert told["stopped_by"] == "patience"
    assert told["steps_done"] < 40


def test_training_stops_by_the_clock_with_a_checkpoint(llama: Bench, tmp_path: Path) -> None:
    told = heal(llama.scene(steps=4000, minutes=1e-6, check_every=1000), tmp_path / "w").about
    assert told["stopped_by"] == "minutes"
    assert (tmp_path / "w" / f"checkpoint-{told['steps_done']}" / "sealed.json").is_file()


def test_adapters_are_merged_into_what_they_computed() -> None:
    pytest.importorskip("peft")
    for family in ("llama", "gpt2"):
        model, inputs = tiny_model(family, dtype=torch.float32), tiny_inputs(family)
        from prunekit.core.recipe_heal import Heal

        names = set(model.state_dict())
        adapted = _lora.adapted(model, Heal(method="distill", lora_rank=3))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                assert parameter.requires_grad == ("lora_" in name)
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
            expected = adapted(**inputs).logits
            merged = _lora.merged(adapted)
            torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
            assert float((tiny_model(family, dtype=torch.float32)(**inputs).logits - expected).abs().max()) > 1e-2
        assert set(merged.state_dict()) == names


def test_missing_peft_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch, llama: Bench) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(HealError, match="needs the package peft") as caught:
        check(llama.scene(train="lora").asked, decoder=True)
    assert "prunekit[heal]" in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_only_what_changed_is_written_in_the_type_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    made = bench(tmp_path, dtype=dtype)
    healed = heal(made.scene(), tmp_path / "w")
    (tmp_path / "o").mkdir()
    changed = healed.write(tmp_path / "o", 5_000_000_000)
    before, after = (load_file(folder / "model.safetensors") for folder in (made.cut, tmp_path / "o"))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    # Tied: the head is no tensor of its own.
    assert "lm_head.weight" not in after
    assert changed == sum(not before[name].equal(after[name]) for name in before) > 0
    (tmp_path / "o" / "config.json").write_bytes((made.cut / "config.json").read_bytes())
    ids = tiny_inputs("llama")["input_ids"]
    with torch.no_grad():
        ours, read = healed.model(ids).logits, load_model(tmp_path / "o")(ids).logits
    torch.testing.assert_close(read, ours, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_families_and_layouts_are_healed(tmp_path: Path, family: str) -> None:
    drop = ("blocks.1.attention", "blocks.1.ffn") if family == "gpt2" else DROP
    made = bench(tmp_path, family, drop=drop)
    healed = heal(made.scene(steps=10, lr=1e-3, check_every=10, hidden=0.5), tmp_path / "w")
    assert healed.about["held_out_after"] < healed.about["held_out_before"]
    (tmp_path / "o").mkdir()
    assert healed.write(tmp_path / "o", 5_000_000_000) > 0


def test_encoder_learns_the_hidden_states_of_the_dense_one(tmp_path: Path) -> None:
    made = bench(tmp_path, "bert", drop=("blocks.1.attention", "blocks.2.ffn"))
    told = heal(made.scene(decoder=False, steps=20, check_every=20, hidden=0.5), tmp_path / "w").about
    assert told["held_out_after"] < 0.8 * told["held_out_before"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"method": "finetune"}, "`finetune` needs a model that writes text"),
        ({"top_k": 4}, "`heal.top_k`"),
        ({"cross_entropy": 0.5}, "`heal.cross_entropy`"),
        ({"data": "teacher"}, "`data: teacher`"),
    ],
    ids=["finetune", "top_k", "cross_entropy", "teacher"],
)
def test_encoder_is_refused_by_name_what_it_cannot_do(llama: Bench, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check(llama.scene(**asked).asked, decoder=False)


def test_empty_data_is_refused_before_any_work(llama: Bench, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UsageError, match="holds no text"):
        check(llama.scene(data=str(tmp_path / "empty.txt")).asked, decoder=True)


SHORT_OF: list[tuple[str, dict[str, Any], str]] = [
    ("less than a batch", {"sequences": 4, "batch": 8}, "do not make a batch of 8"),
    ("too many sequences", {"sequences": 100_000}, "is too short for 100000 sequences"),
    ("shorter than a sequence", {"length_tokens": 100_000}, "too short for 1 sequences"),
]


@pytest.mark.parametrize(("asked", "words"), [entry[1:] for entry in SHORT_OF], ids=[entry[0] for entry in SHORT_OF])
def test_too_little_data_is_refused(llama: Bench, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        gather(llama.scene(**asked))


def test_texts_are_mixed_by_weight_and_the_held_out_part_is_apart(llama: Bench, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("z" * 4000)
    mixed = [{"data": str(llama.text), "weight": 3.0}, {"data": str(tmp_path / "b.txt"), "weight": 1.0}]
    scene = llama.scene(data=mixed, sequences=40, held_out=0.25)
    data = gather(scene)
    z = int(Characters()("z")["input_ids"][0])
    assert data.shares == (30, 10)
    assert int((data.inputs["input_ids"] == z).all(1).sum()) == 10
    assert len(data.held_out) == 10
    assert len(data.train) == 28
    assert not set(data.train.tolist()) & set(data.held_out.tolist())
    assert gather(scene).digest == data.digest
    assert gather(llama.scene(data=mixed, sequences=40, held_out=0.25, seed=1)).digest != data.digest


def test_sequences_left_out_are_what_the_texts_hold_without_repeating_one(llama: Bench, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("z" * (12 * 8))
    mixed = [{"data": str(llama.text), "weight": 1.0}, {"data": str(tmp_path / "b.txt"), "weight": 1.0}]
    assert gather(llama.scene(data=mixed, sequences=None, steps=500)).shares == (8, 8)


def written(scene: Any) -> Tensor:
    return gather(scene).inputs["input_ids"]


def test_teacher_writes_whole_sequences_that_the_seed_decides(llama: Bench) -> None:
    scene = llama.scene(data="teacher", sequences=200)
    ids = written(scene)
    assert ids.shape == (200, 12)
    assert bool((ids[:, 0] == Characters.bos_token_id).all())
    # An end of a document does not end the sequence.
    assert bool((ids[:, 1:-1] == Characters.eos_token_id).any())
    assert written(without_teacher(scene)).equal(ids)
    assert not written(llama.scene(data="teacher", sequences=200, seed=5)).sort(0).values.equal(ids.sort(0).values)


def test_teacher_draws_from_its_whole_distribution(llama: Bench) -> None:
    first = written(llama.scene(data="teacher", sequences=3000, length_tokens=2, seed=3))[:, 1]
    with torch.no_grad():
        expected = load_model(llama.dense)(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    share = torch.bincount(first, minlength=64) / 3000
    # Five standard deviations of each share.
    assert bool(((share - expected).abs() <= 5 * (expected / 3000).sqrt() + 1e-3).all())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_room_for_all_tokens_changes_no_draw(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit.heal import _sample

    made = bench(tmp_path, family, drop=("blocks.1.attention", "blocks.1.ffn"))
    ids = written(made.scene(data="teacher", sequences=20))
    assert bool(_sample._cache(load_model(made.dense), 12)) == (family != "mistral")
    monkeypatch.setattr(_sample, "_cache", lambda *_: {})
    assert written(replace(made.scene(data="teacher", sequences=20), cache=tmp_path / "other")).equal(ids)


def test_compiled_blocks_train_to_the_same_and_are_put_back(
    llama: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile_(work: Any) -> Any:
        compiled.append(getattr(work, "__qualname__", ""))
        return work

    plain = heal(llama.scene(), tmp_path / "a")
    monkeypatch.setattr(torch, "compile", compile_)
    healed = heal(llama.scene(compile=True), tmp_path / "b")
    # The divergence, four blocks of the cut model and four of the dense one.
    assert compiled == ["kl", *["LlamaDecoderLayer.forward"] * 8]
    assert all("forward" not in block.__dict__ for block in healed.model.model.layers)
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(weights(healed.model)[name], value, rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_blocks_give_what_blocks_give(llama: Bench, tmp_path: Path) -> None:
    plain = heal(llama.scene(), tmp_path / "a").about
    healed = heal(llama.scene(compile=True), tmp_path / "b").about
    assert healed["held_out_after"] == pytest.approx(plain["held_out_after"], rel=1e-4)


def test_blocks_of_many_shapes_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit.heal._compile import compiled

    monkeypatch.setattr(torch, "compile", lambda work: work)
    model = tiny_model("llama", dtype=torch.float32)
    blocks = model.model.layers
    for number, block in enumerate(blocks):
        block.extra = torch.nn.Parameter(torch.zeros(number // 3))
    blocks.extend(torch.nn.ModuleList([type(blocks[0])(model.config, i) for i in range(4, 9)]))
    with compiled(model):
        # Of nine blocks three and five are alike; the one of its own shape stays.
        assert ["forward" in block.__dict__ for block in blocks] == [True] * 3 + [False] + [True] * 5


def test_how_long_a_step_took_is_told(llama: Bench, tmp_path: Path) -> None:
    said: list[str] = []
    heal(replace(llama.scene(), talk=said.append), tmp_path / "w")
    assert said[-1].startswith("a step took ")
    assert said[-1].endswith(" tokens a second")


def test_teacher_goes_on_from_prompts(llama: Bench) -> None:
    text = {"data": "teacher", "prompts": str(llama.text), "prompt_tokens": 5}
    ids = written(llama.scene(data=text, sequences=20))
    known = Characters()(llama.text.read_text())["input_ids"]
    windows = {tuple(known[i : i + 5]) for i in range(0, len(known) - 4, 5)}
    assert {tuple(row[:5]) for row in ids.tolist()} <= windows
    with pytest.raises(UsageError, match="leave nothing to write"):
        written(llama.scene(data={**text, "prompt_tokens": 12}))


def test_another_vocabulary_is_refused_by_size_and_by_token() -> None:
    with pytest.raises(HealError, match="another vocabulary") as caught:
        require_same_vocabulary({"vocab_size": 64}, {"vocab_size": 65}, None, None)
    assert "65 tokens, the cut model 64" in caught.value.why

    class Other(Characters):
        def get_vocab(self) -> dict[str, int]:
            return {**super().get_vocab(), "a": 98}

    with pytest.raises(HealError, match="another vocabulary") as caught:
        require_same_vocabulary({"vocab_size": 64}, {"vocab_size": 64}, Characters(), Other())
    assert "`a` is 98 there" in caught.value.why
    require_same_vocabulary({"vocab_size": 64}, {"vocab_size": 64}, Characters(), Characters())


def test_batch_that_processes_cannot_share_is_refused(
    llama: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="cannot be split over 3 processes"):
        heal(llama.scene(), tmp_path / "w")


def test_nothing_is_printed_and_nothing_lies_outside_the_work_folder(
    llama: Bench, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    heal(llama.scene(), tmp_path / "w")
    assert capfd.readouterr() == ("", "")
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
    assert json.loads((tmp_path / "w" / "run.json").read_text())["lr"] == 3e-3


def test_progress_counts_steps(llama: Bench, tmp_path: Path) -> None:
    counted: dict[str, float] = {}

    class Counting:
        def task(self, name: str, total: float | None = None, unit: str = "") -> Any:
            from contextlib import nullcontext

            class Task:
                def advance(self, amount: float = 1) -> None:
                    counted[name] = counted.get(name, 0) + amount

            return nullcontext(Task())

    heal(replace(llama.scene(), progress=Counting()), tmp_path / "w")
    assert counted == {"healing": 4}


def test_bfloat16_trains_weights_that_stay_float32(llama: Bench, tmp_path: Path) -> None:
    healed = heal(llama.scene(dtype="bfloat16", steps=20, check_every=20), tmp_path / "w")
    (tmp_path / "o").mkdir()
    healed.write(tmp_path / "o", 5_000_000_000)
    (tmp_path / "o" / "config.json").write_bytes((llama.cut / "config.json").read_bytes())
    ids = tiny_inputs("llama")["input_ids"]
    with torch.no_grad():
        ours, read = healed.model(ids).logits, load_model(tmp_path / "o")(ids).logits
    # Mixed precision is off again.
    torch.testing.assert_close(ours, read, rtol=0, atol=0)
    assert healed.about["held_out_after"] < 0.8 * healed.about["held_out_before"]
    assert math.isfinite(healed.about["loss"])
