"""Data pruning in processes of its own: two ranks give the scores of one, and a killed run goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")

from tests.tiny import write_tiny

METRICS = ("el2n", "memorization", "ssl_prototypes", "supervised_prototypes", "grad_norm", "ensemble_active")
KNOBS = ("el2n.models=2", "memorization.models=3", "memorization.epochs=1", "grad_norm.models=2")


def score(ranks: int, data: Path, model: Path, folder: Path) -> Path:
    """Scores in fresh processes, each number of ranks with a cache of its own."""
    output = folder / f"{ranks}.parquet"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    words = ["-m", "prunekit.cli.main", "data", "score", str(data), "--model", str(model), "-o", str(output), "-q"]
    words += [word for name in METRICS for word in ("--metric", name)]
    words += [word for knob in (*KNOBS, "ensemble_active.models=2") for word in ("--set", knob)]
    words += ["--overwrite", "--set", "ssl_prototypes.engine=scikit-learn"]
    environment = {**os.environ, "PRUNEKIT_CACHE": str(folder / f"cache{ranks}"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return output


def write_images(folder: Path, n: int) -> None:
    """Noise, dark or light, in a folder a class."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(n):
        own = folder / ("dark" if i % 2 else "light")
        own.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 156, (16, 16, 3)) + (0 if i % 2 else 100)
        Image.fromarray(pixels.astype(np.uint8)).save(own / f"{i}.png")


@pytest.mark.slow
def test_killed_run_leaves_no_scores_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as parquet

    from prunekit.cli.main import main

    write_images(tmp_path / "data", 40)
    model = write_tiny("vit", tmp_path / "vit", image_size=16)
    words = [
        "data",
        "score",
        tmp_path / "data",
        "--metric",
        "memorization",
        "--set",
        "models=12",
        "--model",
        model,
        "-q",
    ]
    asked = [*map(str, words), "-o", str(tmp_path / "scores.parquet")]
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    running = subprocess.Popen([sys.executable, "-m", "prunekit.cli.main", *asked])
    limit = time.monotonic() + 120
    while len(seeds := list((tmp_path / "cache").rglob("seed-*.npz"))) < 3:
        assert running.poll() is None, "ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not list(tmp_path.glob("scores*"))
    before = {file: file.stat().st_mtime_ns for file in seeds}
    assert main(asked) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert len(list((tmp_path / "cache").rglob("seed-*.npz"))) == 12
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "calm"))
    assert main([*asked[:-1], str(tmp_path / "calm.parquet")]) == 0
    killed, calm = (parquet.read_table(tmp_path / f"{name}.parquet") for name in ("scores", "calm"))
    assert killed.column("score_memorization") == calm.column("score_memorization")


@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    # More than two blocks of 256 examples, so that both ranks embed.
    write_images(tmp_path / "data", 600)
    model = write_tiny("vit", tmp_path / "vit", image_size=16)
    one, two = (parquet.read_table(score(n, tmp_path / "data", model, tmp_path)) for n in (1, 2))
    for name in METRICS:
        a, b = (table.column(f"score_{name}").to_numpy() for table in (one, two))
        assert np.array_equal(a, b), name
        assert len(np.unique(a)) > 2, name
    manifests = [json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2)]
    assert manifests[0] == manifests[1]
    # All seeds are there, and no rank left unfinished files.
    seeds = [sorted(p.name for p in (tmp_path / f"cache{n}").rglob("*") if p.is_file()) for n in (1, 2)]
    assert seeds[0] == seeds[1]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache2").rglob("seed-*.npz")}
    score(2, tmp_path / "data", model, tmp_path)
    assert before == {p: p.stat().st_mtime_ns for p in before}
