"""Data pruning under torchrun: two ranks give the scores of one, and a second run trains nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet
    from PIL import Image

    rng = np.random.default_rng(0)
    # More than two blocks of 256 examples, so that both ranks embed.
    for i in range(600):
        folder = tmp_path / "data" / ("dark" if i % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 156, (16, 16, 3)) + (0 if i % 2 else 100)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
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
