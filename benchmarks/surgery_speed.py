"""Dropping blocks of a large checkpoint: prunekit's surgery, `cp` of the bytes it writes, mergekit's passthrough.

`prunekit inspect` of the same checkpoint is timed with them; it writes nothing, and mergekit has nothing like it.

    python benchmarks/surgery_speed.py --work FOLDER --mergekit ENVIRONMENT --output benchmarks/results/surgery.jsonl

Every run is a process of its own. Before a cold run the kernel is asked to forget its input files and all dirty pages
are written out; before a warm run the input is read once. `seconds` ends when the process does, `flushed` when the
kernel has also written the output to disk, since a copy that still sits in memory has not been made. The three take
turns, and their outputs must hold the same tensors bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_checkpoint import write_checkpoint

SHARD_BYTES = 1_000_000_000
SURGERY = """
import json, sys, time
from pathlib import Path
from prunekit.core.files import atomic_folder
from prunekit.core.progress import NULL_PROGRESS
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
source, plan, target, shard_bytes = sys.argv[1:]
begin = time.perf_counter()
view = ModelView.open(Path(source))
with atomic_folder(Path(target), False) as folder:
    engine.apply(view, Plan.from_json(json.loads(Path(plan).read_text())), folder, int(shard_bytes), NULL_PROGRESS)
print(time.perf_counter() - begin)
"""
PLAN = """
import sys
from pathlib import Path
from prunekit.core.files import write_json
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
source, target, *blocks = sys.argv[1:]
drop = [f"blocks.{block}.{part}" for block in blocks for part in ("attention", "ffn")]
write_json(Path(target), Plan.make(ModelView.open(Path(source)), drop=tuple(drop)).to_json())
"""
INSPECT = "from prunekit.cli.main import main; import sys; sys.exit(main(['inspect', sys.argv[1]]))"
# Starts a program with its output on stderr; prints seconds to its end, to the end of a sync and of CPU, and KiB.
LAUNCHER = """
import os, sys, time
begin = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, used = os.wait4(child, 0)
seconds = time.perf_counter() - begin
os.sync()
print([seconds, time.perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss])
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


@dataclass(frozen=True)
class Run:
    """One run of one tool.

    Args:
        work: seconds that the tool's own clock gives for the cut alone, without starting up; None where it has none.
        cpu: seconds of CPU time, which other processes on the machine disturb least.
        peak_mb: largest resident set of the process, 10**6 bytes.
    """

    seconds: float
    flushed: float
    work: float | None
    cpu: float
    peak_mb: float


def files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def forget(folder: Path) -> None:
    """Takes the files of a folder out of the page cache."""
    os.sync()
    for path in files(folder):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_once(folder: Path) -> None:
    os.sync()
    for path in files(folder):
        with path.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def timed(command: list[str], log: Path) -> Run:
    with log.open("wb") as sink:
        # In between lies a small process: the kernel counts the memory of whoever starts a program as the program's.
        start = [sys.executable, "-I", "-S", "-c", LAUNCHER, *command]
        done = subprocess.run(start, stdout=subprocess.PIPE, stderr=sink, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    text = log.read_text(errors="replace")
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{text[-3000:]}")
    seconds, flushed, cpu_s, peak_kib = json.loads(done.stdout)
    last = text.strip().splitlines()[-1:] or [""]
    work = float(last[0]) if last[0].replace(".", "", 1).isdigit() else None
    return Run(seconds, flushed, work, cpu_s, peak_kib * 1024 / 1e6)


def tensors(folder: Path) -> dict[str, tuple[Path, int, int, str]]:
    """File, offset, size and type of every tensor of a folder, by name."""
    found = {}
    for path in files(folder):
        if path.suffix == ".safetensors":
            with path.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    found[name] = (path, 8 + length + begin, end - begin, f"{entry['dtype']} {entry['shape']}")
    return found


def require_same(one: Path, other: Path) -> None:
    """Fails unless two folders hold the same tensors bit for bit."""
    left, right = tensors(one), tensors(other)
    if left.keys() != right.keys():
        raise SystemExit(f"different tensors: {sorted(left.keys() ^ right.keys())[:6]}")
    for name, (path, start, size, kind) in left.items():
        path2, start2, size2, kind2 = right[name]
        with path.open("rb") as a, path2.open("rb") as b:
            a.seek(start)
            b.seek(start2)
            if kind != kind2 or size != size2 or a.read(size) != b.read(size):
                raise SystemExit(f"`{name}` differs: {kind}, {kind2}")


def disk_kind(folder: Path) -> str:
    device = os.stat(folder).st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    name = node.parent.name if (node / "partition").exists() else node.name
    rotational = next(
        (p.read_text().strip() for p in (node / "queue/rotational", node.parent / "queue/rotational") if p.exists()), ""
    )
    kind = "NVMe" if name.startswith("nvme") else "virtual disk" if name.startswith("vd") else "disk"
    return f"{kind}, rotational={rotational}" if rotational else kind


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def passthrough(source: Path, kept: list[int]) -> str:
    """mergekit's recipe that keeps these blocks."""
    runs: list[list[int]] = []
    for block in kept:
        if runs and runs[-1][1] == block:
            runs[-1][1] = block + 1
        else:
            runs.append([block, block + 1])
    slices = "".join(f"  - sources: [{{model: '{source}', layer_range: [{a}, {b}]}}]\n" for a, b in runs)
    return f"slices:\n{slices}merge_method: passthrough\ndtype: bfloat16\n"


def mergekit_facts(environment: Path) -> str:
    code = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'))"
    return subprocess.run([environment / "bin/python", "-c", code], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--work", type=Path, default=Path("out/surgery"), help="folder for everything big; emptied at the end"
    )
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--drop-share", type=float, default=0.2, help="share of the blocks to drop, spread out")
    parser.add_argument(
        "--mergekit", type=Path, help="virtual environment with mergekit; without it only cp is compared"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    given = parser.parse_args()

    work = given.work.resolve()
    source, plan, log = work / "source", work / "plan.json", work / "log"
    if not source.exists():
        write_checkpoint(source, given.gigabytes, SHARD_BYTES)
    blocks = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    n_drop = round(blocks * given.drop_share)
    drop = sorted({round((i + 0.5) * blocks / n_drop) for i in range(n_drop)})
    subprocess.run([sys.executable, "-c", PLAN, source, plan, *map(str, drop)], check=True)
    (work / "merge.yaml").write_text(passthrough(source, [b for b in range(blocks) if b not in drop]))

    ours, copy, theirs = work / "prunekit", work / "copy", work / "mergekit"
    tools: dict[str, tuple[Path, Path, list[str]]] = {
        "prunekit": (
            source,
            ours,
            [sys.executable, "-c", SURGERY, str(source), str(plan), str(ours), str(SHARD_BYTES)],
        ),
        "inspect": (source, work / "nothing", [sys.executable, "-c", INSPECT, str(source)]),
        "cp": (ours, copy, ["cp", "-r", str(ours), str(copy)]),
    }
    if given.mergekit:
        command = [str(given.mergekit.absolute() / "bin/mergekit-yaml"), str(work / "merge.yaml"), str(theirs)]
        command += ["--no-copy-tokenizer", "--quiet", "--out-shard-size", str(SHARD_BYTES // 2)]
        tools["mergekit"] = (source, theirs, command)
        tools["mergekit async"] = (source, theirs, [*command, "--async-write"])

    load_before = round(os.getloadavg()[1], 1)
    states: dict[str, Callable[[Path], None]] = {"cold": forget, "warm": read_once}
    runs: dict[tuple[str, str], list[Run]] = {}
    for _ in range(given.rounds):
        for state, prepare in states.items():
            for name, (reads, writes, command) in tools.items():
                shutil.rmtree(writes, ignore_errors=True)
                prepare(reads)
                runs.setdefault((state, name), []).append(timed(command, log))
                if name.startswith("mergekit"):
                    require_same(ours, theirs)
    written = {name: sum(path.stat().st_size for path in files(writes)) for name, (_, writes, _) in tools.items()}
    facts = {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "disk": disk_kind(work),
        "python": platform.python_version(),
        "torch": version("torch"),
        "mergekit": mergekit_facts(given.mergekit).split()[0] if given.mergekit else "",
        "load_before": load_before,
        "load_after": round(os.getloadavg()[1], 1),
    }
    rows = []
    for (state, name), done in runs.items():
        work_s = [run.work for run in done if run.work is not None]
        rows.append(
            {
                "what": name,
                "page_cache": state,
                "read_gb": round(sum(p.stat().st_size for p in files(tools[name][0])) / 1e9, 3),
                "written_gb": round(written[name] / 1e9, 3),
                "blocks": f"{blocks} -> {blocks - len(drop)}",
                "rounds": len(done),
                "seconds": round(statistics.median(run.seconds for run in done), 2),
                "flushed": round(statistics.median(run.flushed for run in done), 2),
                "flushed_all": [round(run.flushed, 2) for run in done],
                "work": round(statistics.median(work_s), 2) if work_s else None,
                "cpu_s": round(statistics.median(run.cpu for run in done), 2),
                "times_cp": round(
                    statistics.median(run.flushed for run in done)
                    / statistics.median(run.flushed for run in runs[state, "cp"]),
                    2,
                ),
                "peak_mb": round(max(run.peak_mb for run in done)),
                "facts": facts,
            }
        )
    for row in rows:
        print(json.dumps(row))
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        with given.output.open("a", encoding="utf-8") as opened:
            opened.writelines(json.dumps(row) + "\n" for row in rows)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
