"""A trimmed vocabulary: the tokens that stay are made and computed as before, and any text still reads back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import prunekit.pipeline.carry_out as carry_out
from prunekit import pipeline
from prunekit.calibrate.texts import load_text
from prunekit.checkpoint.sources import resolve
from prunekit.checkpoint.vocabulary import Vocabulary, closed
from prunekit.core.errors import CheckpointError, PlanError, RecipeError, SurgeryError
from prunekit.core.recipe import parse_recipe
from prunekit.export.verify import VerifyReport
from prunekit.modeling.load import load_model
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.tiny import write_tiny

REAL = {"llama": ("smollm2-135m-instruct", 49152), "bert": ("all-minilm-l6-v2", 30522)}
SEEN = "The castle stood on a hill above the river, and its keeper counted 37 boats. " * 3
UNSEEN = load_text("wikitext2_eval")[:4000] + "naïve über 日本語 🙂 \n\n\tzzqx <|im_start|>user"


@pytest.fixture(scope="module", params=sorted(REAL))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with all rows of a real tokenizer, byte-level BPE or WordPiece."""
    name, rows = REAL[request.param]
    folder = write_tiny(request.param, tmp_path_factory.mktemp(request.param) / "model", vocab_size=rows)
    (folder / "text.txt").write_text(SEEN)
    for file in resolve(name).folder.glob("*"):
        if "token" in file.name:
            shutil.copyfile(file, folder / file.name)
    return folder


def recipe(folder: Path, vocab: dict[str, Any], **more: Any) -> Any:
    source = {"schema": 1, "model": {"source": str(folder)}, **more}
    return parse_recipe({**source, "vocab": {"data": str(folder / "text.txt"), **vocab}})


def trimmed(folder: Path, target: Path, **vocab: Any) -> tuple[Path, list[int]]:
    made = pipeline.make_plan(recipe(folder, vocab))
    target.mkdir()
    engine.apply(made.view, made.plan, target)
    written = ModelView.open(target).checkpoint.tensors.values()
    assert made.after.params == sum(torch.Size(info.shape).numel() for info in written)
    return target, list(made.plan.keep["vocab"])


def test_text_of_kept_tokens_has_the_same_tokens_and_the_same_outputs(model: Path, tmp_path: Path) -> None:
    folder, kept = trimmed(model, tmp_path / "cut", coverage=1.0)
    dense, cut = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(folder)
    old, new = dense(SEEN)["input_ids"], cut(SEEN)["input_ids"]
    assert [kept[number] for number in new] == old
    assert len(kept) < len(dense) // 4
    before, after = (load_model(place, "float64") for place in (model, folder))
    assert after.config.vocab_size == len(kept)
    with torch.no_grad():
        expected, found = before(torch.tensor([old[:60]]))[0], after(torch.tensor([new[:60]]))[0]
    if expected.shape[-1] > len(kept):
        expected = expected[..., kept]
    assert torch.equal(expected, found)
    if after.get_output_embeddings() is not None:
        assert after.get_output_embeddings().weight is after.get_input_embeddings().weight


def test_any_text_reads_back_and_special_tokens_keep_their_names(model: Path, tmp_path: Path) -> None:
    folder, kept = trimmed(model, tmp_path / "cut", coverage=0.5, multiple_of=64)
    assert len(kept) % 64 == 0
    dense, cut = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(folder)
    long, short = cut(UNSEEN)["input_ids"], dense(UNSEEN)["input_ids"]
    assert len(long) > len(short)
    assert cut.decode(long) == dense.decode(short)
    assert max(long) < len(kept)
    assert cut.all_special_tokens == dense.all_special_tokens
    for name in cut.all_special_tokens:
        assert kept[cut.convert_tokens_to_ids(name)] == dense.convert_tokens_to_ids(name)
    old, new = (json.loads((place / "config.json").read_text()) for place in (model, folder))
    for key in (key for key in old if key.endswith("_token_id") and old[key] is not None):
        assert kept[new[key]] == old[key]


def test_count_is_kept_to_and_one_that_is_too_small_is_refused(model: Path) -> None:
    vocabulary = Vocabulary.read(model)
    few = len(closed(vocabulary, ())) + 40
    plan = pipeline.make_plan(recipe(model, {"keep": few})).plan
    assert len(plan.keep["vocab"]) == few
    with pytest.raises(PlanError, match="too few"):
        pipeline.make_plan(recipe(model, {"keep": 20}))


def test_tokens_that_stay_keep_what_they_are_built_from() -> None:
    data = {
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(["a", "b", "c", "ab", "bc", "abc", "cc"])},
            "merges": ["a b", "b c", "ab c", "c c"],
        }
    }
    vocabulary = Vocabulary(Path(), data)
    assert closed(vocabulary, [5]) == {0, 1, 2, 3, 5}
    assert closed(vocabulary, [6]) == {0, 1, 2, 6}


def test_run_measures_the_result_by_its_own_tokenizer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "bert" in str(model):
        pytest.skip("an encoder has no perplexity")
    monkeypatch.setattr(carry_out, "_verified", lambda *arguments: VerifyReport(Path(), ()))
    measured = {"perplexity": {"data": str(model / "text.txt"), "sequences": 2, "length_tokens": 16}}
    result = pipeline.run(recipe(model, {"coverage": 1.0}, evaluate=measured), tmp_path / "out")
    # The same tokens, of which the softmax has fewer to share with.
    assert result.after["perplexity"] < result.before["perplexity"]
    assert result.after["params"] < result.before["params"] / 2
    manifest = json.loads((tmp_path / "out" / "prunekit.json").read_text())
    assert manifest["vocab"]["covered"] == 1.0
    assert pipeline.reproduce(tmp_path / "out").same


@pytest.mark.slow
def test_pretrained_model_is_trimmed_reloads_and_reads_back_real_text(tmp_path: Path) -> None:
    source = {
        "schema": 1,
        "model": {"source": "smollm2-135m-instruct"},
        "vocab": {"data": "wikitext2", "coverage": 1.0},
    }
    result = pipeline.run(parse_recipe(source), tmp_path / "out")
    assert result is not None
    assert result.verified.ok, result.verified.problems
    assert 0.14 < 1 - result.after["weight_bytes"] / result.before["weight_bytes"] < 0.16
    folder = resolve("smollm2-135m-instruct").folder
    dense, cut = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (load_text("wikitext2"), load_text("wikitext2_eval"), UNSEEN):
        assert cut.decode(cut(text)["input_ids"]) == dense.decode(dense(text)["input_ids"])
    kept = list(result.made.plan.keep["vocab"])
    old, new = (tokenizer(load_text("wikitext2"))["input_ids"] for tokenizer in (dense, cut))
    assert [kept[number] for number in new] == old
    with torch.no_grad():
        expected = load_model(folder)(torch.tensor([old[:200]])).logits[..., kept]
        found = load_model(tmp_path / "out")(torch.tensor([new[:200]])).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_what_cannot_be_trimmed_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`heal` does not go with `vocab`"):
        recipe(model, {"coverage": 1.0}, heal={"method": "distill"})
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "generation_config.json").write_text('{"suppress_tokens": [5]}')
    with pytest.raises(SurgeryError, match="suppress_tokens"):
        pipeline.make_plan(recipe(copy, {"coverage": 1.0}))
    data = json.loads((copy / "tokenizer.json").read_text())
    data["model"] = {"type": "Unigram", "vocab": []}
    (copy / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="cannot lose tokens"):
        pipeline.make_plan(recipe(copy, {"coverage": 1.0}))
    view = ModelView.open(model)
    with pytest.raises(PlanError, match="are wrong"):
        Plan.make(view, keep={"vocab": [3, 2]})
