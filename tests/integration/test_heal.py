"""Healing from start to end: in a recipe, of a folder that was cut earlier, after a kill, and on two ranks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import prunekit.pipeline.carry_out as carry_out
from prunekit import pipeline
from prunekit.cli.main import main
from prunekit.core.errors import HealError, UsageError
from prunekit.core.recipe import load_recipe, parse_recipe
from prunekit.export.verify import VerifyReport
from tests.tiny import write_tiny

Small = Callable[[str], Path]
HEAL = {"method": "distill", "steps": 6, "batch": 4, "length_tokens": 16, "sequences": 40, "check_every": 2, "lr": 1e-3,
        "held_out": 0.2}  # fmt: skip


def recipe(folder: Path, **sections: Any) -> Any:
    step = {"remove": "ffn", "by": {"score": "random"}, "budget": {"units": 2}}
    return parse_recipe({"schema": 1, "model": {"source": str(folder)}, "steps": [step], **sections})


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the two fresh processes out; the first test and the one on two ranks have them."""
    monkeypatch.setattr("prunekit.export.verify.verify", lambda *arguments, **named: VerifyReport(Path(), ()))


@pytest.fixture(scope="session")
def cut(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `prunekit prune` cut, with a perplexity in its manifest; not verified."""
    folder = tmp_path_factory.mktemp("cut") / "cut"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(carry_out, "_verified", lambda *arguments: VerifyReport(Path(), ()))
        asked = recipe(small("llama"), evaluate={"perplexity": {"sequences": 2, "length_tokens": 16}})
        pipeline.run(asked, folder)
    return folder


@pytest.mark.slow
def test_recipe_heals_after_cut_and_repair_and_verifies_what_was_healed(small: Small, tmp_path: Path) -> None:
    said: list[str] = []
    asked = recipe(
        small("llama"),
        repair={"method": "least_squares", "calibrate": {"sequences": 8, "length_tokens": 16}},
        heal={**HEAL, "dtype": "bfloat16"},
        evaluate={"perplexity": {"sequences": 2, "length_tokens": 16}},
        export={"formats": ["safetensors"], "max_shard_bytes": 3_000_000},
    )
    result = pipeline.run(asked, tmp_path / "o", talk=said.append)
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert not list((tmp_path / "o").glob(".*"))
    assert result.verified.ok
    assert result.verified.max_abs_diff is not None
    assert result.verified.max_abs_diff < 1e-9
    details = [check.detail for check in result.verified.checks if check.name.startswith("computes the same")]
    assert all("the healed model in memory" in detail for detail in details)
    assert len(list((tmp_path / "o").glob("model-*.safetensors"))) > 1
    manifest = json.loads((tmp_path / "o" / "prunekit.json").read_text())
    figures = [manifest[side]["perplexity"] for side in ("before", "cut", "after")]
    assert len(set(figures)) == 3
    assert manifest["heal"]["held_out_after"] < manifest["heal"]["held_out_before"]
    assert manifest["heal"]["changed_tensors"] > 0
    assert load_recipe(tmp_path / "o" / "recipe.yaml").effective() == asked.effective()
    card = (tmp_path / "o" / "README.md").read_text()
    assert "| | unit | before | cut | after | change (%) |" in card
    assert "Healed by distill (all): 6 steps" in card
    assert '<th scope="col" class="r">cut</th>' in (tmp_path / "o" / "report.html").read_text()
    assert any(line.startswith("step 6 of 6: held-out loss") for line in said)


def test_healing_that_cannot_be_is_refused_before_any_work(small: Small, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    bad = [
        (small("bert"), {**HEAL, "method": "finetune"}, UsageError, "`finetune` needs a model that writes text"),
        (small("llama"), {**HEAL, "data": str(tmp_path / "empty.txt")}, UsageError, "holds no text"),
        (small("gpt2"), {**HEAL, "length_tokens": 129}, UsageError, "a sequence of `heal` is longer than"),
        (write_tiny("vit", tmp_path / "vit"), HEAL, UsageError, "needs a model that reads text"),
    ]
    for folder, heal, error, words in bad:
        with pytest.raises(error, match=words):
            pipeline.run(recipe(folder, heal=heal), tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_prune_in_many_processes_is_refused(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="a recipe with `heal` runs in one process"):
        pipeline.run(recipe(small("llama"), heal=HEAL), tmp_path / "o")


def command(cut: Path, output: Path, *more: str) -> list[str]:
    asked = [f"--set=heal.{key}={json.dumps(value)}" for key, value in HEAL.items() if key not in ("method", "steps")]
    return ["heal", str(cut), "-o", str(output), "--steps", "6", *asked, *more]


def test_folder_cut_earlier_is_healed_by_what_its_manifest_names(
    cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], unverified: None
) -> None:
    before = {path.name: path.read_bytes() for path in cut.iterdir() if path.is_file()}
    assert main(command(cut, tmp_path / "o", "--json", "--quiet", "--set", "heal.hidden=0.5")) == 0
    told = json.loads(capsys.readouterr().out)
    assert {path.name: path.read_bytes() for path in cut.iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert told["heal"]["hidden"] == 0.5
    manifest = json.loads((tmp_path / "o" / "prunekit.json").read_text())
    earlier = json.loads((cut / "prunekit.json").read_text())
    assert manifest["cut"] == earlier["after"]
    assert manifest["before"] == earlier["before"]
    assert manifest["after"]["perplexity"] != earlier["after"]["perplexity"]
    assert manifest["after"]["params"] == earlier["after"]["params"]
    assert "Healed by distill" in (tmp_path / "o" / "README.md").read_text()
    assert load_recipe(tmp_path / "o" / "recipe.yaml").heal is not None
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (cut, tmp_path / "o"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_bad_input_of_the_verb_is_one_error(
    small: Small, cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny("llama", tmp_path / "other", vocab_size=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((cut / name).read_bytes())
    bare = write_tiny("llama", tmp_path / "bare", vocab_size=49152)
    bad = [
        (command(cut, tmp_path / "o", "--teacher", str(other)), 1, "another vocabulary"),
        (command(bare, tmp_path / "o"), 2, "which model was cut is not known"),
        (command(cut, tmp_path / "o", "--method", "distil"), 2, "did you mean `distill`?"),
        (command(cut, tmp_path / "o", "--data", "nowhere.txt"), 2, "no text named `nowhere.txt`"),
        (command(cut, cut), 2, "exists"),
    ]
    for words, code, said in bad:
        assert main(words) == code, said
        assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert not list(tmp_path.glob(".*"))


def test_folder_without_a_manifest_is_healed_by_the_teacher_named(
    small: Small, cut: Path, tmp_path: Path, unverified: None
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in cut.iterdir():
        if path.is_file() and path.name != "prunekit.json":
            (bare / path.name).write_bytes(path.read_bytes())
    asked = pipeline.heal_recipe(bare, str(small("llama")), HEAL)
    result = pipeline.heal_folder(bare, asked, tmp_path / "o")
    assert result is not None
    told = json.loads((tmp_path / "o" / "heal.json").read_text())
    assert told["heal"]["held_out_after"] < told["heal"]["held_out_before"]
    assert not (tmp_path / "o" / "prunekit.json").exists()
    with pytest.raises(UsageError, match="which blocks were removed"):
        pipeline.heal_folder(
            bare, pipeline.heal_recipe(bare, str(small("llama")), {**HEAL, "hidden": 1.0}), tmp_path / "p"
        )


def test_killed_healing_goes_on_where_it_was(
    cut: Path, tmp_path: Path, unverified: None, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ("--steps", "400", "--set", "heal.held_out=0.1")
    killed = subprocess.Popen(
        [sys.executable, "-m", "prunekit.cli.main", *command(cut, tmp_path / "o", *many)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".o.heal/checkpoint-*/sealed.json")) and time.monotonic() < deadline:
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".o.heal"]
    reached = max(int(p.parent.name.rpartition("-")[2]) for p in tmp_path.glob(".o.heal/checkpoint-*/sealed.json"))
    # Fewer steps to go on for would be another schedule, so the rest is made short by the clock.
    assert main(command(cut, tmp_path / "o", *many, "--minutes", "0.02")) == 0
    assert "going on from step" in capsys.readouterr().err
    told = json.loads((tmp_path / "o" / "prunekit.json").read_text())["heal"]
    assert told["steps_done"] > reached >= 2
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


@pytest.mark.slow
def test_two_ranks_give_the_weights_of_one(cut: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for ranks, start in ((1, []), (2, torchrun)):
        words = command(cut, tmp_path / f"o{ranks}", "--quiet", "--set", "heal.top_k=32", "--set", "heal.held_out=0.22")
        done = subprocess.run(
            [sys.executable, *start, "-m", "prunekit.cli.main", *words], capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.splitlines()[-1] == str(tmp_path / f"o{ranks}")
    one, two = (load_file(tmp_path / f"o{ranks}" / "model.safetensors") for ranks in (1, 2))
    # Nine rows are held out, which two processes cannot share alike.
    told = [json.loads((tmp_path / f"o{ranks}" / "prunekit.json").read_text())["heal"] for ranks in (1, 2)]
    assert told[1]["held_out_before"] == pytest.approx(told[0]["held_out_before"], rel=1e-5)
    raw = load_file(cut / "model.safetensors")
    moved = max(float((one[name] - raw[name]).abs().max()) for name in one)
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    # Sums in another order; Adam makes a step of noise where a gradient is near zero.
    assert apart <= 0.005 * moved, (apart, moved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o1", "o2"]


def test_diverged_healing_in_a_recipe_leaves_no_output(small: Small, tmp_path: Path) -> None:
    heal = {**HEAL, "lr": 1e12, "max_grad_norm": 1e30, "steps": 40, "check_every": 40}
    with pytest.raises(HealError, match="is not a number"):
        pipeline.run(recipe(small("llama"), heal=heal), tmp_path / "o")
    assert list(tmp_path.iterdir()) == []
