"""A checkpoint larger than memory: inspected, scored, calibrated and cut by the command line under a memory limit.

    python benchmarks/bigger_than_memory.py --work FOLDER --output benchmarks/results/bigger_than_memory.jsonl

Every verb is a process of its own in a control group with the limit, which counts the page cache too and takes it back
where it must. The kernel is asked to forget the checkpoint before each, so that what a verb reads of it counts as its
own. Where no group can be made (it takes root), the peak is measured all the same and `limited_by` says so.
FOLDER takes the checkpoint and what is left of it, and is emptied at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_checkpoint import write_checkpoint
from surgery_speed import LAUNCHER, cpu, forget
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

GROUPS = ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max"))
RUN = "from prunekit.cli.main import main; import sys; sys.exit(main(sys.argv[1:]))"


class Group:
    """A control group of version 1 or 2 with a memory limit; `name` is "" where none can be made."""

    def __init__(self, limit_bytes: int) -> None:
        self.folder, self.name = Path(), ""
        for root, file in GROUPS:
            folder = root / f"prunekit-{os.getpid()}"
            with suppress(OSError):
                folder.mkdir()
                self.folder = folder
                (folder / file).write_text(str(limit_bytes))
                self.name = f"cgroup {file}"
                return

    def enter(self) -> None:
        """Puts the calling process into the group."""
        if self.name:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self) -> None:
        if self.name:
            self.folder.rmdir()


def run(group: Group, *words: object) -> dict[str, object]:
    """Seconds and peak resident set of one verb."""
    # As in surgery_speed: the kernel counts the memory of whoever starts a program as the program's.
    command = [sys.executable, "-I", "-S", "-c", LAUNCHER, sys.executable, "-c", RUN, *map(str, words)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, preexec_fn=group.enter)
    if done.returncode:
        raise SystemExit(f"{words} failed:\n{done.stderr.decode(errors='replace')[-3000:]}")
    seconds, _, cpu_s, peak_kib = json.loads(done.stdout)
    return {"seconds": round(seconds, 1), "cpu_s": round(cpu_s, 1), "peak_rss_mb": round(peak_kib * 1024 / 1e6)}


def size_gb(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9, 2)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, for what calibrates on text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_recipe(file: Path, source: Path, score: str, remove: float, more: dict[str, object]) -> Path:
    steps = [{"remove": "blocks", "by": {"score": score}, "budget": {"remove": remove}}]
    file.write_text(json.dumps({"schema": 1, "model": {"source": str(source)}, "steps": steps, **more}))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, default=Path("out/bigger"), help="folder for everything big")
    parser.add_argument("--gigabytes", type=float, default=20.5)
    parser.add_argument("--limit-gb", type=float, default=2.0)
    parser.add_argument("--remove", type=float, default=0.1, help="fraction of the blocks to drop")
    parser.add_argument(
        "--sequences", type=int, default=0, help="calibrate block_influence on so many x 128 tokens too; 0 for not"
    )
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    given = parser.parse_args()

    work = given.work.resolve()
    source, plan, cut = work / "source", work / "plan.json", work / "cut"
    begin = time.perf_counter()
    if not source.exists():
        write_checkpoint(source, given.gigabytes)
    print(f"written in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    group = Group(int(given.limit_gb * 1e9))
    write_tokenizer(source)
    read = {"calibrate": {"data": "wikitext2", "sequences": max(1, given.sequences), "length_tokens": 128}}
    recipe = write_recipe(work / "recipe.json", source, "gardener", given.remove, {})
    calibrated = write_recipe(work / "calibrated.json", source, "block_influence", given.remove, read)
    verbs: dict[str, tuple[object, ...]] = {
        "inspect": ("inspect", source),
        "gardener": ("plan", "--recipe", recipe, "--output", plan),
        "block_influence": ("plan", "--recipe", calibrated, "--output", work / "calibrated-plan.json"),
        "apply": ("apply", plan, "--model", source, "--output", cut),
    }
    if not given.sequences:
        del verbs["block_influence"]
    rows = []
    for name, words in verbs.items():
        forget(source)
        figures = run(group, *words, "--quiet")
        tokens = {"tokens": given.sequences * 128} if name == "block_influence" else {}
        rows.append({"what": name, "source_gb": size_gb(source), "limit_gb": given.limit_gb, **tokens, **figures})
        print(json.dumps(rows[-1]), file=sys.stderr)
    rows[-1]["written_gb"] = size_gb(cut)
    facts = {
        "limited_by": group.name or "nothing: peak measured only",
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "load": round(os.getloadavg()[1], 1),
    }
    group.remove()
    for row in rows:
        print(json.dumps({**row, "facts": facts}))
    if given.output:
        with given.output.open("a", encoding="utf-8") as opened:
            opened.writelines(json.dumps({**row, "facts": facts}) + "\n" for row in rows)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
