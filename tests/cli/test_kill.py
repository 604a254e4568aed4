"""A run that is killed leaves no folder that looks finished, and the next run succeeds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunekit.cli.main import main
from prunekit.core.files import write_json
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView

SCRIPT = Path(__file__).with_name("killed.py")


@pytest.fixture
def plan(tiny_llama: Path, tmp_path: Path) -> Path:
    """Plan file that drops a block."""
    (tmp_path / "plans").mkdir()
    file = tmp_path / "plans" / "plan.json"
    view = ModelView.open(tiny_llama)
    write_json(file, Plan.make(view, ["blocks.1.attention", "blocks.1.ffn"]).to_json())
    return file


def killed_everywhere(folder: Path, *command: object) -> tuple[list[dict[str, Any]], list[str]]:
    """What each run left of those killed one step later each, and the steps at which they were."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *map(str, command)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    return [line for line in lines if "killed" in line], [line["step"] for line in lines if "step" in line]


def test_apply_killed_at_every_step_leaves_nothing_until_it_is_whole(
    tiny_llama: Path, plan: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    asked = ["apply", plan, "--model", tiny_llama, "--max-shard-bytes", 40000, "--quiet"]
    runs, steps = killed_everywhere(work, *asked, "--output", work / "out")
    assert main([*map(str, asked), "--output", str(tmp_path / "calm")]) == 0
    calm = {f"out/{file.name}": file.read_bytes().hex() for file in (tmp_path / "calm").iterdir()}
    for kind in ("mkdir", "model-00002", "half a copy", "index.json", "config.json", "rename"):
        assert any(kind in step for step in steps), steps
    # Each run begins with what the one before it left, and gets a step further.
    first_whole = [run["found"] for run in runs].index(calm)
    assert first_whole > 12
    assert all(run["found"] == {} for run in runs[:first_whole])
    assert all(run["found"] == calm for run in runs[first_whole:])
    assert [path.name for path in work.iterdir()] == ["out"]


def test_overwriting_killed_at_every_step_keeps_the_old_folder_or_has_the_new_one(
    tiny_llama: Path, plan: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    asked = ["apply", str(plan), "--model", str(tiny_llama), "--output", str(work / "out"), "--quiet"]
    assert main(asked) == 0
    (work / "out" / "mine.json").write_text("{}")
    old = {f"out/{file.name}": file.read_bytes().hex() for file in (work / "out").iterdir()}
    runs, _ = killed_everywhere(work, *asked, "--overwrite")
    *killed, whole = runs
    new = whole["found"]
    assert len(killed) > 8
    assert set(old) - set(new) == {"out/mine.json"}
    assert all(run["found"] in (old, new, {}) for run in killed)
    # Between two renames there is none; the next run puts the old one back before it begins.
    assert sum(run["found"] == {} for run in killed) <= 2
    assert whole["status"] == 0
    assert [path.name for path in work.iterdir()] == ["out"]


STAGES = ("model.safetensors", "onnx", "onnx/model.onnx", "prunekit.json", "README.md")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_prune_killed_when_a_stage_begins_leaves_no_folder_and_the_next_run_succeeds(
    tiny_llama: Path, tmp_path: Path, stage: str
) -> None:
    command = ["prune", str(tiny_llama), "--remove", "blocks", "--fraction", "0.25", "--method", "gardener"]
    command += ["--formats", "safetensors,onnx", "--output", str(tmp_path / "out"), "--quiet"]
    running = subprocess.Popen([sys.executable, "-m", "prunekit.cli.main", *command], stdout=subprocess.DEVNULL)
    for _ in until(running, 300):
        if any(tmp_path.glob(f".out.*.part/{stage}")) or any(tmp_path.glob(f".out.*.part/.{stage}.*.part")):
            break
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert main(["verify", str(tmp_path / "out")]) == 0


def until(running: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
    """Comes round every millisecond while a process runs.

    Raises:
        AssertionError: if it ends.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert running.poll() is None
        yield
        time.sleep(0.001)
