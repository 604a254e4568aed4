"""Seconds and memory of ssl_prototypes on a stream of embeddings, against scikit-learn's KMeans on all of them.

    python benchmarks/ssl_prototypes.py --examples 1000000 --clusters 100
    python benchmarks/ssl_prototypes.py --examples 1000000 --clusters 300 1000 --kmeans-examples 50000
    python benchmarks/ssl_prototypes.py --memory

Embeddings of 384 dimensions: 300 Gaussian clusters of unequal size, not well separated. Each way runs in a process of
its own; on a busy machine compare CPU seconds, not seconds. `distance` is the mean of the scores, the smaller the
better the centroids; `agree` the rank correlation of the scores with those of KMeans. With `--memory` the embeddings
are ten times the bound.

All of KMeans, its k-means++ start too, takes time in proportion to the examples; `--kmeans-examples` gives it only the
first so many, where all would take many minutes. `scored` says how many the seconds are of; distance and agreement are
left out, as centroids of few examples say nothing about those of all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 384
WAYS = ("KMeans", "faiss", "minibatch")


def write_embeddings(file: Path, n: int, centres: int = 300, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(centres, WIDTH)).astype(np.float32)
    share = rng.pareto(2.0, centres) + 0.2
    array = np.lib.format.open_memmap(file, "w+", "float32", (n, WIDTH))
    for first in range(0, n, 8192):
        rows = min(8192, n - first)
        own = mean[rng.choice(centres, rows, p=share / share.sum())]
        array[first : first + rows] = own + 1.5 * rng.normal(size=(rows, WIDTH)).astype(np.float32)
    array.flush()


def peak_mib() -> float:
    """Most memory this process has held. Not getrusage, whose figure a child begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def one(file: Path, way: str, k: int, memory_mib: int, scores: Path, kmeans_examples: int) -> dict[str, Any]:
    """Scores by one way, in this process.

    Args:
        kmeans_examples: how many KMeans reads, the first ones; 0 for all.
    """
    from prunekit.datasets.arrays import read_rows
    from prunekit.datasets.clusters import fit, nearest
    from prunekit.datasets.metrics._cosine import cosine_distance, unit_length

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        for first, block in read_rows(file):
            yield first, unit_length(block)

    n = np.load(file, mmap_mode="r").shape[0]
    if way == "faiss":
        import faiss  # noqa: F401
    else:
        import sklearn.cluster  # noqa: F401
    before, begin, spent = peak_mib(), time.perf_counter(), time.process_time()
    if way == "KMeans":
        from sklearn.cluster import KMeans

        n = min(n, kmeans_examples or n)
        points = np.concatenate([block for first, block in blocks() if first < n])[:n]
        made = KMeans(k, n_init=1, max_iter=25, random_state=0, copy_x=False).fit(points)
        centroids, used = made.cluster_centers_, f"KMeans, {made.n_iter_} iterations"
        found = cosine_distance(points, centroids[made.labels_])
    else:
        engine = "faiss" if way == "faiss" else "scikit-learn"
        fitted = fit(blocks, n, WIDTH, k, 0, 25, engine, memory_mib)  # type: ignore[arg-type]
        centroids, used = fitted.centroids, f"{fitted.engine}, {fitted.points:,} points"
        found = np.empty(n, np.float32)
        for first, block in blocks():
            found[first : first + len(block)] = cosine_distance(block, centroids[nearest(block, centroids)])
    seconds, spent = time.perf_counter() - begin, time.process_time() - spent
    np.save(scores, found)
    peak = peak_mib()
    return {
        "way": way,
        "used": used,
        "scored": n,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(spent, 2),
        "peak_mib": round(peak),
        "grew_mib": round(peak - before),
    }


def child(file: Path, way: str, k: int, scores: Path, options: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", str(file), way, str(k), str(scores)]
    words += ["--memory-mib", str(options.memory_mib), "--kmeans-examples", str(options.kmeans_examples)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation."""
    ranks = [np.argsort(np.argsort(x)).astype(np.float64) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200_000)
    parser.add_argument("--clusters", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--memory-mib", type=int, default=64, help="bound on the embeddings held at once")
    parser.add_argument("--memory", action="store_true", help="leave KMeans out: embeddings of ten times the bound")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ssl_prototypes.jsonl"))
    parser.add_argument("--kmeans-examples", type=int, default=0, help="how many KMeans reads [0: all]")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        file, way, k, scores = options.child
        found = one(Path(file), way, int(k), options.memory_mib, Path(scores), options.kmeans_examples)
        print(json.dumps(found))
        return
    n = options.memory_mib * 10 * (1 << 20) // (4 * WIDTH) if options.memory else options.examples
    ways = [way for way in options.ways if way != "KMeans"] if options.memory else options.ways
    with tempfile.TemporaryDirectory() as folder, options.out.open("a", encoding="utf-8") as out:
        file = Path(folder) / "embeddings.npy"
        write_embeddings(file, n)
        for k in options.clusters:
            held: np.ndarray | None = None
            for way in ways:
                found = child(file, way, k, Path(folder) / "scores.npy", options)
                scores = np.load(Path(folder) / "scores.npy")
                whole = found["scored"] == n
                held = scores if way == "KMeans" and whole else held
                row = {
                    "examples": n,
                    "data_mib": round(n * WIDTH * 4 / (1 << 20)),
                    "clusters": k,
                    "bound_mib": options.memory_mib,
                    **found,
                    "examples_s": round(found["scored"] / found["seconds"]),
                    "examples_cpu_s": round(found["scored"] / found["cpu_seconds"]),
                    "distance": round(float(scores.mean()), 5) if whole else None,
                    "agree": round(agreement(scores, held), 4) if held is not None else None,
                    "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
                    "processor": platform.machine(),
                    "load": round(os.getloadavg()[0], 1),
                }
                out.write(json.dumps(row) + "\n")
                out.flush()
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
