"""An output folder is made again from its manifest, and compared byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import prunekit.pipeline.carry_out as carry_out
from prunekit import pipeline
from prunekit.cli.main import main
from prunekit.core.errors import CheckpointError, UsageError
from prunekit.core.recipe import parse_recipe
from prunekit.export.verify import VerifyReport

DATA = {"sequences": 2, "length_tokens": 16}


@pytest.fixture(scope="module")
def run(small: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run with everything that decides bytes: its own text, a search, a repair, a healing. Do not write to it."""
    place = tmp_path_factory.mktemp("run")
    shutil.copytree(small("llama"), place / "model")
    (place / "text.txt").write_text("A tale of two rivers that met below the old town. " * 40)
    text = {"data": str(place / "text.txt")}
    recipe = parse_recipe(
        {
            "schema": 1,
            "model": {"source": str(place / "model")},
            "calibrate": {**DATA, **text},
            "steps": [{"remove": "sublayers", "by": {"search": "finercut"}, "budget": {"units": 2}}],
            "repair": {"method": "least_squares", "calibrate": {**DATA, **text}},
            "heal": {"method": "distill", "steps": 2, "batch": 2, "length_tokens": 16, "sequences": 8, **text},
            "evaluate": {"latency": {"prompt_tokens": 4, "new_tokens": 2, "repeats": 1}},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(carry_out, "_verified", lambda *arguments: VerifyReport(Path(), ()))
        pipeline.run(recipe, place / "out")
    return SimpleNamespace(model=place / "model", text=place / "text.txt", out=place / "out")


@pytest.fixture
def copy(run: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the output to write to."""
    return shutil.copytree(run.out, tmp_path / "out")


def test_every_file_comes_out_the_same_though_the_model_was_moved(
    run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.model, tmp_path / "moved")
    assert main(["reproduce", str(run.out), "--model", str(tmp_path / "moved"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["same"]
    assert {file["name"] for file in said["files"]} == {path.name for path in run.out.iterdir()}
    assert "model.safetensors" in {file["name"] for file in said["files"]}


def test_files_that_are_not_of_the_run_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    manifest = json.loads((copy / "prunekit.json").read_text())
    manifest["plan"]["drop"].pop()
    (copy / "prunekit.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    (copy / "recipe.yaml").unlink()
    (copy / "helper.py").write_text("")
    assert main(["reproduce", str(copy), "--json"]) == 3
    states = {file["name"]: file["state"] for file in json.loads(capsys.readouterr().out)["files"]}
    odd = {name: state for name, state in states.items() if state != "same"}
    assert odd == {
        "model.safetensors": "differs",
        "prunekit.json": "differs",
        "recipe.yaml": "missing",
        "helper.py": "extra",
    }


def test_all_inputs_that_are_missing_or_changed_are_named_before_any_work(
    run: SimpleNamespace, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.pipeline.reproduction.make_plan", None)
    moved = shutil.copytree(run.model, tmp_path / "moved")
    (moved / "tokenizer_config.json").unlink()
    with (moved / "model.safetensors").open("r+b") as opened:
        opened.seek(-4, 2)
        opened.write(b"abcd")
    manifest = json.loads((copy / "prunekit.json").read_text())
    manifest["recipe"]["calibrate"]["data"] = str(tmp_path / "gone.txt")
    (copy / "prunekit.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as caught:
        pipeline.reproduce(copy, str(moved))
    lines = caught.value.why.splitlines()
    assert len(lines) == 3
    assert "model.safetensors` has the SHA-256" in lines[0]
    assert "tokenizer_config.json` is missing" in lines[1]
    assert lines[2].startswith("`calibrate.data`")
    assert caught.value.exit_code == 1


def test_folder_without_a_manifest_is_wrong_usage(run: SimpleNamespace) -> None:
    with pytest.raises(UsageError, match=r"prunekit\.json"):
        pipeline.reproduce(run.model)
