"""Gardener against reading: seconds and memory to score a checkpoint of several GB, beside reading the same bytes.

    python benchmarks/gardener_read.py --size-gb 3 --out benchmarks/results/gardener_read.jsonl

Makes a Llama-shaped bfloat16 checkpoint with random weights in a temporary folder and deletes it afterwards. Both sides
start from an empty page cache (posix_fadvise), in turns, each in a process of its own; medians count. The reader takes
the same bytes in the order of the files, 8 MiB at a time, and does nothing with them. The goal is a ratio of at most 2
and less than 1 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_checkpoint import write_checkpoint

from prunekit.checkpoint.reader import Checkpoint
from prunekit.evaluate.memory import peak_memory
from prunekit.scores._weights import CheckpointWeights, matrices
from prunekit.scores.gardener import Gardener
from prunekit.structure.view import ModelView

BUFFER_BYTES = 8 * 2**20


def forget(folder: Path) -> None:
    """Drops the checkpoint from the page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ranges(folder: Path) -> list[tuple[Path, int, int]]:
    """File, start and length of every tensor that Gardener reads, in file order."""
    view = ModelView.open(folder)
    names = [ref.name for refs in view.groups("blocks")[0].members for ref in matrices(refs)]
    infos = [view.checkpoint.tensors[name] for name in names]
    return sorted((folder / info.file, info.start, info.n_bytes) for info in infos)


def read(folder: Path) -> dict[str, Any]:
    """Reads the bytes once."""
    parts = ranges(folder)
    buffer = memoryview(bytearray(BUFFER_BYTES))
    start = time.perf_counter()
    total = 0
    for path, first, length in parts:
        with path.open("rb", buffering=0) as handle:
            done = 0
            while done < length:
                done += os.preadv(handle.fileno(), [buffer[: length - done]], first + done)
            total += done
    return {"seconds": time.perf_counter() - start, "bytes": total}


def score(folder: Path) -> dict[str, Any]:
    """Scores all blocks, opening the checkpoint included."""
    with peak_memory() as peak:
        start = time.perf_counter()
        view = ModelView.open(folder)
        found = Gardener().score(view.groups("blocks")[0], CheckpointWeights(Checkpoint.open(folder)), {})
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "host_bytes": peak.host_bytes, "entropy_nats": [round(x, 4) for x in found.tolist()]}


def apart(work: str, folder: Path) -> dict[str, Any]:
    """Runs `read` or `score` in a process of its own."""
    command = [sys.executable, __file__, "--work", work, "--folder", str(folder)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(out.splitlines()[-1]))


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {"read": [], "score": []}
    for _ in range(repeats):
        for work in rows:
            forget(folder)
            rows[work].append(apart(work, folder))
    seconds = {work: statistics.median(r["seconds"] for r in found) for work, found in rows.items()}
    size = rows["read"][0]["bytes"]
    return {
        "bytes": size,
        "read_s": round(seconds["read"], 3),
        "score_s": round(seconds["score"], 3),
        "ratio": round(seconds["score"] / seconds["read"], 3),
        "read_s_all": [round(r["seconds"], 3) for r in rows["read"]],
        "score_s_all": [round(r["seconds"], 3) for r in rows["score"]],
        "read_gb_s": round(size / seconds["read"] / 1e9, 3),
        "peak_rss_mb": round(max(r["host_bytes"] for r in rows["score"]) / 1e6, 1),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=3.0, help="size of the checkpoint in 10**9 bytes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--temporary", type=Path, help="where the checkpoint is made [the system's temporary folder]")
    parser.add_argument("--out", type=Path, help="JSON lines file to add the result to")
    parser.add_argument("--work", choices=["read", "score"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        print(json.dumps((read if chosen.work == "read" else score)(chosen.folder)))
        return
    with tempfile.TemporaryDirectory(dir=chosen.temporary) as name:
        folder = Path(name) / "model"
        write_checkpoint(folder, chosen.size_gb)
        os.sync()
        row = {
            "what": "gardener_read",
            "dtype": "bfloat16",
            "repeats": chosen.repeats,
            **measure(folder, chosen.repeats),
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit(),
        }
    line = json.dumps(row)
    if chosen.out:
        with chosen.out.open("a") as handle:
            handle.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
