"""Scoring, selecting and reporting under a hard cap on memory, of a data set many times larger than the cap.

    python benchmarks/data_memory.py --cap-mib 512 --times 10

Writes Parquet shards of text whose size in memory is `--times` the cap, one row group each (all of them names of one
file, which saves writing), and random embeddings in the place where those of the model would lie (to make them would
take hours and says nothing about memory). Then every
step runs in a process of its own whose private memory cannot grow past the cap (RLIMIT_DATA; a larger allocation
fails). `control` reads the same data at once under the same cap, and must fail. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 384
SHARDS = 8
SCORE = ("--metric", "random", "--metric", "ssl_prototypes", "--set", "ssl_prototypes.clusters=100", "--set")
CONTROL = "import sys, pyarrow.parquet as parquet; print(parquet.read_table(sys.argv[1]).nbytes)"


def write_data(folder: Path, size: int, row_bytes: int) -> int:
    """Shards of text and class with `size` bytes of text in all; returns the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 10))) for _ in range(4000)])
    texts = pa.array([" ".join(rng.choice(words, row_bytes // 6))[:row_bytes].ljust(row_bytes) for _ in range(500)])
    schema, rows = pa.schema([("text", pa.string()), ("label", pa.int64())]), size // row_bytes // SHARDS
    folder.mkdir()
    table = pa.table([texts.take(pa.array(rng.integers(0, 500, rows))), rng.integers(0, 10, rows)], schema=schema)
    parquet.write_table(table, folder / "000.parquet", row_group_size=rows, use_dictionary=False)
    for shard in range(1, SHARDS):
        (folder / f"{shard:03}.parquet").hardlink_to(folder / "000.parquet")
    return rows * SHARDS


def write_embeddings(data: Path, model: str | None, n: int) -> int:
    """Embeddings where prunekit's cache has those of this data and model; returns their bytes."""
    from prunekit.checkpoint.cache import cache_folder
    from prunekit.datasets.encoder import encoder
    from prunekit.datasets.examples import embeddings_key
    from prunekit.datasets.source import open_source

    source = open_source(data)
    file = cache_folder() / "data" / f"{embeddings_key(source, encoder(model, source, 'cpu', 256))}.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    array = np.lib.format.open_memmap(file, "w+", "float32", (n, WIDTH))
    rng = np.random.default_rng(1)
    mean = rng.normal(size=(300, WIDTH)).astype(np.float32)
    for first in range(0, n, 4096):
        rows = min(4096, n - first)
        array[first : first + rows] = mean[rng.integers(0, 300, rows)] + rng.normal(size=(rows, WIDTH))
    array.flush()
    return array.nbytes


def capped(words: list[str], cap: int, folder: Path, limit_s: int = 1800) -> dict[str, Any]:
    """Runs a command whose private memory cannot pass `cap` bytes; its outcome, seconds and peak of resident memory."""
    # Allocators that reserve gigabytes ahead would hit the cap without using it.
    allocators = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"}
    begin = time.perf_counter()
    child = subprocess.Popen(
        words,
        cwd=folder,
        env={**os.environ, **allocators, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (cap, cap)),
    )
    peak, output = peaks(child, begin + limit_s)
    return {"rc": child.returncode, "seconds": round(time.perf_counter() - begin, 1), **peak, "said": output[-200:]}


def peaks(child: subprocess.Popen[str], until: float) -> tuple[dict[str, int], str]:
    """Most resident and private memory in MiB, looked at every 50 ms until the process ends, and what it printed."""
    most = {"VmHWM": 0, "VmData": 0}
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        for name, value in memory(status):
            most[name] = max(most[name], value)
        time.sleep(0.05)
        if time.perf_counter() > until:
            child.kill()
    output = child.stdout.read() if child.stdout else ""
    return {"peak_rss_mib": most["VmHWM"] >> 10, "peak_private_mib": most["VmData"] >> 10}, output


def memory(status: Path) -> Iterator[tuple[str, int]]:
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmData"):
            yield name, int(value.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cap-mib", type=int, default=512)
    parser.add_argument("--times", type=int, default=10, help="size of the text in memory, in caps")
    parser.add_argument("--row-kib", type=int, default=16, help="text of one example")
    parser.add_argument("--bound-mib", type=int, default=32, help="`--memory-mib`: embeddings that k-means may hold")
    # faiss wants a cap of 640: its library reserves some 260 MiB, most of which it never touches.
    parser.add_argument("--engine", choices=("scikit-learn", "faiss"), default="scikit-learn", help="of k-means")
    parser.add_argument("--model", help="source of the model whose embeddings they would be [MiniLM]")
    parser.add_argument("--folder", type=Path, help="where the data is written [the system's temporary folder]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data_memory.jsonl"))
    options = parser.parse_args()
    cap = options.cap_mib << 20
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        os.environ["PRUNEKIT_CACHE"] = str(folder / "cache")
        n = write_data(folder / "data", options.times * cap, options.row_kib << 10)
        embeddings = write_embeddings(folder / "data", options.model, n)
        tool = [sys.executable, "-m", "prunekit.cli.main", "data"]
        model = ["--model", options.model] if options.model else []
        score = [
            "score",
            "data",
            *SCORE,
            f"ssl_prototypes.engine={options.engine}",
            *model,
            "--memory-mib",
            str(options.bound_mib),
            "-o",
            "s.parquet",
        ]
        steps = {
            "score": [*tool, *score],
            "select": [
                *tool,
                "select",
                "s.parquet",
                "--metric",
                "ssl_prototypes",
                "--keep",
                "0.3",
                "-o",
                "kept.parquet",
            ],
            "report": [*tool, "report", "s.parquet", "--metric", "ssl_prototypes"],
            "control": [sys.executable, "-c", CONTROL, "data"],
        }
        for name, words in steps.items():
            row = {
                "step": name,
                "cap_mib": options.cap_mib,
                "data_mib": n * (options.row_kib << 10) >> 20,
                "embeddings_mib": embeddings >> 20,
                "examples": n,
                **capped(words, cap, folder),
                "processor": platform.machine(),
                "load": round(os.getloadavg()[0], 1),
            }
            row["examples_s"] = round(n / row["seconds"])
            print(json.dumps(row), flush=True)
            with options.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
