"""`evaluate` and `compare` on small models with a real tokenizer: reuse, resumption, bad input, recipes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit.pipeline.carry_out as carry_out
from prunekit import pipeline
from prunekit.cli.main import main
from prunekit.core.errors import EvaluationError, PrunekitError, UsageError
from prunekit.core.recipe import parse_recipe
from prunekit.evaluate.run import check, evaluate
from prunekit.evaluate.specs import parse_task
from prunekit.evaluate.subject import Subject, open_subject
from prunekit.export.verify import VerifyReport
from tests.tiny import write_tiny

Small = Callable[[str], Path]
TASKS = ("perplexity,sequences=2,length_tokens=16", "arithmetic,limit=2", "repetition,limit=2,new_tokens=6")


def opened(folder: Path) -> Subject:
    return open_subject(str(folder), "cpu", "float32", 4)


def run(folder: Path, cache: Path, *tasks: str, fresh: bool = False) -> Any:
    (found,) = evaluate(check([(opened(folder), [parse_task(text) for text in tasks])]), fresh, cache)
    return found.measured


def values(measured: Any) -> dict[str, float]:
    return {f"{e.asked.label}.{name}": figure.value for e in measured for name, figure in e.figures.items()}


def test_finished_tasks_are_reused_until_something_changes(small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small("llama"), folder)
    first = run(folder, tmp_path / "cache", *TASKS)
    assert [entry.reused for entry in first] == [False] * 3
    again = run(folder, tmp_path / "cache", *TASKS)
    assert [entry.reused for entry in again] == [True] * 3
    assert values(again) == values(first)
    assert [e.figures for e in again] == [e.figures for e in first]
    assert [e.reused for e in run(folder, tmp_path / "cache", *TASKS[:1], fresh=True)] == [False]
    other = run(folder, tmp_path / "cache", "perplexity,sequences=3,length_tokens=16", TASKS[1])
    assert [entry.reused for entry in other] == [False, True]
    # The same size and the same time: only the content tells that the weights are others.
    weights = folder / "model.safetensors"
    times, content = weights.stat(), bytearray(weights.read_bytes())
    content[-100:] = bytes(100)
    weights.write_bytes(content)
    import os

    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [entry.reused for entry in run(folder, tmp_path / "cache", TASKS[0])] == [False]


def test_a_run_that_was_ended_goes_on_with_the_next_task(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunekit.evaluate.tasks.arithmetic import Arithmetic

    def ends(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Arithmetic, "run", ends)
        with pytest.raises(KeyboardInterrupt):
            run(small("llama"), tmp_path, *TASKS)
    assert [entry.reused for entry in run(small("llama"), tmp_path, *TASKS)] == [True, False, False]


def test_a_damaged_result_is_measured_again(small: Small, tmp_path: Path) -> None:
    before = run(small("llama"), tmp_path, TASKS[0])
    for file in tmp_path.rglob("*.json"):
        file.write_text('{"figures": {"perplexity": 3}}')
    after = run(small("llama"), tmp_path, TASKS[0])
    assert not after[0].reused
    assert values(after) == values(before)


def test_bad_input_is_refused_before_any_model_is_loaded(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("prunekit.modeling.load.load_model", load)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"context": "word " * 200, "choices": [" a", " b"], "label": 0}))
    llama, bert = small("llama"), small("bert")
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    (broken / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    bare = write_tiny("llama", tmp_path / "bare")
    for folder, task, said in (
        (llama, f"multiple_choice:{rows}", "longer than"),
        (llama, "perplexity,length_tokens=256", "longer than"),
        (llama, "perplexity:no-such-text", "no text named"),
        (bert, "perplexity", "needs a model that writes text"),
        (llama, "images:a.zip,train=b.zip", "needs an image encoder"),
        (bare, "arithmetic", "has no tokenizer"),
        (broken, "arithmetic", ""),
        (tmp_path / "none", "arithmetic", "no model"),
    ):
        with pytest.raises(PrunekitError, match=said):
            check([(opened(folder), [parse_task(task)])])


def test_two_tasks_of_one_name_are_refused(small: Small) -> None:
    with pytest.raises(UsageError, match="go by the name"):
        check([(opened(small("llama")), [parse_task("arithmetic"), parse_task("arithmetic,limit=3")])])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_probe_and_similarity_read_both_kinds(small: Small, tmp_path: Path, family: str) -> None:
    rows = tmp_path / "pairs.jsonl"
    pairs = [("a cat", "a cat", 5), ("a cat", "the red house by the sea", 1), ("one", "one two", 3), ("x", "y z", 2)]
    rows.write_text("\n".join(json.dumps({"s1": a, "s2": b, "score": s}) for a, b, s in pairs))
    found = values(run(small(family), tmp_path, f"similarity:{rows}", "probe,limit=12,train_limit=12,length_tokens=32"))
    assert -1.0 <= found["pairs.spearman"] <= 1.0
    assert 0.0 <= found["subjectivity_dev.acc"] <= 1.0


def test_image_model_is_probed(tmp_path: Path) -> None:
    from PIL import Image

    for part, numbers in (("train", range(4)), ("dev", range(4, 6))):
        for label, colour in (("red", 0), ("blue", 2)):
            (tmp_path / part / label).mkdir(parents=True)
            for n in numbers:
                pixel = [10 * n] * 3
                pixel[colour] = 250
                Image.new("RGB", (9, 9), tuple(pixel)).save(tmp_path / part / label / f"{n}.png")
    folder = write_tiny("vit", tmp_path / "vit")
    found = values(run(folder, tmp_path, f"images:{tmp_path / 'dev'},train={tmp_path / 'train'},neighbours=3"))
    assert found == {"dev.knn": 1.0, "dev.linear": 1.0}


def test_image_classifier_is_judged_by_its_head(tmp_path: Path) -> None:
    from PIL import Image

    folder = write_tiny("vit", tmp_path / "vit")
    subject = opened(folder)
    colours = [(200, 10, 30), (10, 220, 40), (90, 90, 90), (0, 0, 250)]
    scaled = [[(c / 255 - 0.5) / 0.5 for c in colour] for colour in colours]
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    images = torch.tensor(scaled)[:, :, None, None].expand(-1, 3, 16, 16)
    with torch.no_grad():
        logs = subject.model(pixel_values=images).logits.double().log_softmax(-1)
    # By name and by number: the first two images are said to be what the model says, the others to be something else.
    said = [(best + (n > 1)) % 5 for n, best in enumerate(logs.argmax(-1).tolist())]
    for n, (colour, number) in enumerate(zip(colours, said, strict=True)):
        label = f"LABEL_{number}" if n == 0 else str(number)
        (tmp_path / "dev" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(tmp_path / "dev" / label / f"{n}.png")
    (found,) = run(folder, tmp_path, f"classify:{tmp_path / 'dev'}")
    assert found.figures["acc"].value == 0.5
    expected = [-float(logs[n, number]) for n, number in enumerate(said)]
    assert sorted(found.figures["answer_nll"].examples[0]) == pytest.approx(sorted(expected), rel=1e-4)
    (tmp_path / "dev" / "zebra").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "dev" / "zebra" / "0.png")
    with pytest.raises(UsageError, match="no class `zebra`"):
        check([(opened(folder), [parse_task(f"classify:{tmp_path / 'dev'}")])])


@pytest.mark.slow
def test_compare_says_where_models_part(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    other = tmp_path / "other"
    shutil.copytree(small("llama"), other)
    write_tiny("llama", other, seed=3, vocab_size=49152)
    same = tmp_path / "same"
    shutil.copytree(small("llama"), same)
    wanted = ["--task", TASKS[0], "--task", TASKS[1], "--windows", "2", "--length-tokens", "24", "-q"]
    code = main(
        ["compare", str(small("llama")), str(same), str(other), *wanted, "--json", "-o", str(tmp_path / "o.json")]
    )
    assert code == 0
    first, second = json.loads(capsys.readouterr().out)["comparisons"]
    assert first["kl"]["mean"]["value"] == 0.0
    assert first["kl"]["same_choice"] == 1.0
    assert all(row["difference"] == 0 for row in first["differences"])
    kl = second["kl"]
    assert kl["tokens"] == 2 * 23
    assert kl["mean"]["value"] > 0.01
    worst = kl["passages"][0]["worst"][0]
    assert worst["kl"] >= kl["passages"][0]["kl"] >= kl["passages"][-1]["kl"]
    assert worst["text"]
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["models"][0]["tasks"][0]["figures"]["perplexity"]["examples"]
    assert main(["compare", str(small("llama")), str(other), *wanted]) == 0
    shown = capsys.readouterr().out
    assert "95 % interval" in shown
    assert "became" in shown
    assert "paired percentile bootstrap" in shown


def test_divergence_equals_its_definition(small: Small, tmp_path: Path) -> None:
    from prunekit.evaluate.divergence import divergence

    write_tiny("llama", tmp_path / "b", seed=5, vocab_size=49152)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(small("llama") / name, tmp_path / "b" / name)
    a, b = opened(small("llama")), opened(tmp_path / "b")
    ids = torch.randint(10, 400, (3, 12), generator=torch.Generator().manual_seed(0))
    found = divergence(a, b, ids, "noise", passages=2, passage_tokens=4)
    with torch.no_grad():
        p, q = (side.model(ids).logits[:, :-1].double().log_softmax(-1) for side in (a, b))
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.mean.value == pytest.approx(float(kl.mean()), rel=1e-4)
    best = kl.unfold(1, 4, 1).mean(-1)
    assert found.passages[0].kl == pytest.approx(float(best.max()), rel=1e-4)
    row, start = divmod(int(best.argmax()), best.shape[1])
    place = start + int(kl[row, start : start + 4].argmax())
    assert found.passages[0].worst[0].text == a.tokenizer.decode([int(ids[row, place + 1])])
    assert found.passages[0].worst[0].kl == pytest.approx(float(kl[row, place]), rel=1e-4)
    assert found.passages[0].text != found.passages[1].text


@pytest.mark.parametrize(
    ("models", "said"), [(["llama"], "nothing to compare"), (["llama", "bert"], "different kinds")]
)
def test_compare_refuses(small: Small, capsys: pytest.CaptureFixture[str], models: list[str], said: str) -> None:
    assert main(["compare", *(str(small(name)) for name in models)]) in (1, 2)
    assert said in capsys.readouterr().err


def test_evaluate_prints_reuses_and_writes(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    call = ["evaluate", str(small("llama")), "--task", TASKS[0], "--limit", "1", "-o", str(tmp_path / "o.json")]
    assert main(call) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "o.json")
    assert any(line.split()[:3] == ["perplexity", "perplexity", "1"] for line in lines)
    assert main([*call, "--overwrite"]) == 0
    assert "--fresh measures again" in capsys.readouterr().err
    assert main(call) == 2
    assert "exists" in capsys.readouterr().err


def recipe(folder: Path, **sections: Any) -> Any:
    step = {"remove": "blocks", "by": {"score": "gardener"}, "budget": {"units": 1}}
    return parse_recipe({"schema": 1, "model": {"source": str(folder)}, "steps": [step], **sections})


def test_recipe_measures_tasks_and_marks_what_misses_its_limits(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carry_out, "_verified", lambda *arguments: VerifyReport(Path(), ()))
    window = {"sequences": 2, "length_tokens": 16}
    tasks = [
        {"task": "arithmetic", "limit": 2},
        {"task": "perplexity", "name": "sliding", **window, "stride_tokens": 8},
    ]
    limits = {"arithmetic.acc_min": 0.0, "sliding.perplexity_max": 1.0}
    asked = recipe(small("llama"), evaluate={"perplexity": window, "tasks": tasks}, expect={"figures": limits})
    assert parse_recipe(asked.effective()).effective() == asked.effective()
    result = pipeline.run(asked, tmp_path / "o")
    assert [(entry["name"], entry["ok"]) for entry in result.expectations] == [
        ("arithmetic.acc_min", True),
        ("sliding.perplexity_max", False),
    ]
    manifest = json.loads((tmp_path / "o" / "prunekit.json").read_text())
    assert manifest["accepted"] is False
    assert manifest["after"]["figures"]["sliding.perplexity"] == result.after["figures"]["sliding.perplexity"]
    assert result.after["figures"]["sliding.perplexity"] != result.after["perplexity"]
    card = (tmp_path / "o" / "README.md").read_text()
    assert "## Not accepted" in card
    assert "sliding.perplexity_max" in card


@pytest.mark.parametrize(
    ("evaluate_", "expect", "said"),
    [
        ({"tasks": ["aritmetic"]}, {}, "no task named"),
        ({"tasks": [{"task": "arithmetic", "limits": 3}]}, {}, "unknown key `limits`"),
        ({"tasks": ["arithmetic", "arithmetic"]}, {}, "go by the name"),
        ({"tasks": [{"limit": 3}]}, {}, "`task` is missing"),
        ({"tasks": ["arithmetic"]}, {"arithmetic.acc": 0.5}, "no limit of a figure"),
        ({"tasks": ["arithmetic"]}, {"arithmetik.acc_min": 0.5}, "has no `arithmetik`"),
        ({"tasks": ["arithmetic"]}, {"arithmetic.acc_norm_min": 0.5}, "gives no figure"),
        ({}, {"arithmetic.acc_min": 0.5}, "has no `arithmetic`"),
    ],
)
def test_wrong_tasks_of_a_recipe_are_found_when_it_is_read(evaluate_: Any, expect: Any, said: str) -> None:
    with pytest.raises(PrunekitError) as caught:
        recipe(Path("model"), evaluate=evaluate_, expect={"figures": expect} if expect else {})
    assert said in f"{caught.value.what} {caught.value.why}"


def test_missing_data_of_a_recipe_ends_the_run_before_the_search(small: Small, tmp_path: Path) -> None:
    asked = recipe(small("llama"), evaluate={"tasks": [{"task": "multiple_choice", "data": "none.jsonl"}]})
    with pytest.raises(UsageError, match="no rows named"):
        pipeline.run(asked, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_nan_is_an_error_and_nothing_is_kept(small: Small, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(small("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EvaluationError, match="not a number"):
        run(folder, tmp_path / "cache", TASKS[0])
    assert not list((tmp_path / "cache").rglob("*.json"))


@pytest.mark.slow
def test_exported_decoder_gives_torchs_figures(small: Small, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    from prunekit.export.onnx import export_onnx

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"context": "The sky is", "choices": [" blue", " very green"], "label": 0}\n' * 2)
    last = tmp_path / "last.jsonl"
    last.write_text('{"context": "The sky is", "target": " blue"}\n{"context": "a b", "target": " c d"}\n')
    export_onnx(small("llama"), tmp_path / "onnx")
    tasks = (
        "perplexity,sequences=3,length_tokens=24,stride_tokens=8",
        f"multiple_choice:{rows}",
        f"cloze:{last}",
        "arithmetic,limit=3",
        "repetition,limit=3,new_tokens=8",
    )
    bound = ("latency,prompt_tokens=4,new_tokens=2,repeats=1", "memory,prompt_tokens=4,new_tokens=2")
    ours, theirs = (run(f, tmp_path / "cache", *tasks, *bound) for f in (small("llama"), tmp_path / "onnx"))
    for one, other in zip(ours[: len(tasks)], theirs, strict=False):
        for name, figure in one.figures.items():
            assert other.figures[name].value == pytest.approx(figure.value, rel=1e-4), (one.asked.label, name)
    speed, memory = (entry.figures for entry in theirs[len(tasks) :])
    assert speed["decode_p95_ms"].value >= speed["decode_p50_ms"].value > 0
    assert speed["prefill_p95_ms"].value >= speed["prefill_p50_ms"].value > 0
    assert memory["host_bytes"].value > memory["weight_bytes"].value > 0
    with pytest.raises(UsageError, match="gives no vectors"):
        check([(opened(tmp_path / "onnx"), [parse_task("probe:subjectivity_dev,limit=2")])])
    with pytest.raises(UsageError, match="cannot measure an ONNX folder"):
        check([(opened(tmp_path / "onnx"), [parse_task("lm_eval:hellaswag")])])


@pytest.mark.slow
def test_exported_encoder_gives_torchs_figures(small: Small, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    from prunekit.export.onnx import export_onnx

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"s1": "a {i}", "s2": "{i * i} b c", "score": {i % 3}}}\n' for i in range(6)))
    export_onnx(small("bert"), tmp_path / "onnx")
    tasks = (f"similarity:{pairs}", "latency,prompt_tokens=8,repeats=1")
    ours, theirs = (run(f, tmp_path / "cache", *tasks) for f in (small("bert"), tmp_path / "onnx"))
    found, expected = (side[0].figures["spearman"] for side in (theirs, ours))
    assert found.examples[0] == pytest.approx(expected.examples[0], abs=1e-5)
    assert set(theirs[1].figures) == {"prefill_tokens_s", "prefill_p50_ms", "prefill_p95_ms"}


def test_a_device_that_onnxruntime_has_not_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    from prunekit.export.ort import providers

    if len(providers()) > 1:
        pytest.skip("this ONNX Runtime has CUDA")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UsageError, match="does not run on `cuda`"):
        open_subject(str(tmp_path), "cuda", None, 4)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert open_subject(str(tmp_path), "cuda", None, 4, auto=True).device == "cpu"


def test_sparse_attention_is_measured_and_kept_apart(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder, encoder = str(small("llama")), str(small("bert"))
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    common = ["evaluate", decoder, "--task", "perplexity,sequences=2,length_tokens=64", "--json", "--quiet"]
    found = []
    narrow = "sink_window,sink_tokens=0,window_tokens=2"
    for more in ([], ["--attention", narrow], ["--attention", "dense"]):
        assert main([*common, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["models"][0])
    dense, sparse, whole = ([t["figures"]["perplexity"]["value"] for t in model["tasks"]] for model in found)
    assert not any(task["reused"] for model in found for task in model["tasks"])
    assert sparse != pytest.approx(dense, rel=1e-3)
    assert whole == pytest.approx(dense, rel=1e-5)
    assert found[1]["attention"]["pattern"] == "sink_window"
    assert "attention" not in found[0]
    assert main([*common, "--attention", "powr"]) == 2
    assert main([*common, "--attention", "sink_window,window_tokens=many"]) == 2
    assert main(["evaluate", encoder, "--attention", "power"]) == 2
