"""Every attention kernel on one GPU beside the strongest peers, in one run of under five minutes; tests first.

    python benchmarks/attention_suite.py --out rows.jsonl [--seconds 285] [--only power decode scored backward grid]

Sections, in the order of what would be missed most: power prefill (variants of the Hopper and portable kernels), one
decode step at batch 8 and 1 with and without the choosing of pages, scored prefill end to end, gradients, two- and
three-dimensional neighbourhoods. Llama-3-8B heads (32 query, 8 key-value, size 128), bfloat16. Each section checks its
kernels against float64 or float32 before it times them; a section whose check failed gets no ratios. A case that fails
becomes a row with the error's text and costs no other case. Rows are written as they come. `--rehearse` runs the whole
script on tiny shapes without a GPU, under TRITON_INTERPRET=1; its times mean nothing.

The kernels are compiled first, all sections at once in processes of their own, so that the run itself finds them in the
compilers' caches; `--no-warm` leaves that out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import torch
from attention_sections import backward, decode, grid, power, scored
from attention_sections.bench import Bench, Part

SECTIONS = {
    "power": power.run, "decode": decode.run, "scored": scored.run, "backward": backward.run, "grid": grid.run,
}  # fmt: skip


def warm_up(bench: Bench) -> None:
    """Compiles what every section needs, side by side."""
    options = bench.options
    bench.marks.unlink(missing_ok=True)
    common = [sys.executable, __file__, "--out", str(options.out), "--warm", "--seconds", "90", "--only"]
    running = [subprocess.Popen([*common, name], stdout=subprocess.DEVNULL) for name in options.only]
    late = []
    for name, process in zip(options.only, running, strict=True):
        try:
            process.wait(timeout=max(1.0, options.compile_seconds - bench.seconds()))
        except subprocess.TimeoutExpired:
            process.kill()
            late.append(name)
    if "power" in options.only:
        every = list(power.variants(bench))
        bench.tried = set(bench.marks.read_text().splitlines()) if bench.marks.exists() else set()
        for name in sorted(set(every) - set(power.variants(bench))):
            bench.write({"section": "power", "what": name, "error": "its check did not finish in its own process"})
    bench.marks.unlink(missing_ok=True)
    bench.write({"section": "about", "what": "warm", "seconds": round(bench.seconds()), "not_finished": late})


def run(bench: Bench) -> int:
    """Runs the chosen sections and prints ratios; 1 if a check failed."""
    if not (bench.rehearse or bench.warm or bench.options.no_warm):
        warm_up(bench)
    if not bench.warm:
        with Part(bench, "about").case("ceilings"):
            bench.ceilings()
    for name in bench.options.only:
        with Part(bench, name).case("section"):
            SECTIONS[name](bench)
        if bench.on == "cuda":
            torch.cuda.empty_cache()
    bench.write({"section": "about", "what": "done", "failed_checks": bench.failed, "seconds": round(bench.seconds())})
    print(*(f"  FAILED {line}" for line in bench.failed), sep="\n")
    for row in bench.rows:
        if "ratios" in row:
            print(f"\n{row['section']} {row['shape']}: times as fast as")
            for name, peers in row["ratios"].items():
                print(f"  {name:44s}", *(f"{peer} {times:.2f}" for peer, times in peers.items()), sep="  ")
    return 1 if bench.failed else 0


def main() -> int:
    """Checks, times, prints ratios; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are written here")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=285, help="nothing new is begun after so many")
    parser.add_argument("--compile-seconds", type=float, default=110, help="what compiling first may take")
    parser.add_argument("--commit", default="", help="what the rows call the code; asked of git if not given")
    parser.add_argument("--no-warm", action="store_true", help="compile as it goes")
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", action="store_true", help="small, without a GPU, times mean nothing")
    options = parser.parse_args()
    if options.rehearse:
        options.seconds = 1e9
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; `--rehearse` runs without one, under TRITON_INTERPRET=1")
    warnings.filterwarnings("ignore")
    return run(Bench(options))


if __name__ == "__main__":
    sys.exit(main())
