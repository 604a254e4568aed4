"""Tiles of the portable prefill kernel, and the Hopper kernel where it takes the case.

    python benchmarks/attention_tiles.py --out rows.jsonl

`default_tile` goes by these figures. Every way is compared with the first on the same tensors and timed twice, in turn
forwards and backwards; the shorter median counts. Tiles that need more shared memory than the card has are named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from attention_device import facts, in_turns
from attention_ours import hopper_with
from torch import Tensor

from prunekit.runtime.attention.patterns._engine import Pattern, block_lists
from prunekit.runtime.attention.patterns.dense import Dense
from prunekit.runtime.attention.patterns.neighborhood import Neighborhood
from prunekit.runtime.attention.patterns.power import Power
from prunekit.runtime.attention.patterns.sink_window import SinkWindow
from prunekit_kernels.block_sparse_prefill import cases, portable
from prunekit_kernels.block_sparse_prefill.op import hopper_takes
from prunekit_kernels.block_sparse_prefill.portable import Tile

TILES = (Tile(64, 4, 3), Tile(64, 4, 2), Tile(64, 8, 3), Tile(128, 8, 2), Tile(128, 8, 3), Tile(32, 4, 3))
POWER = Power(128, 8)
# Name, sequences, query heads, key-value heads, tokens, head size, pattern, padded, gated.
CASES: tuple[tuple[str, int, int, int, int, int, Pattern, bool, bool], ...] = (
    ("power", 1, 32, 8, 32768, 128, POWER, False, False),
    ("power, padded", 4, 32, 8, 8192, 128, POWER, True, False),
    ("dense, padded", 4, 32, 8, 4096, 128, Dense(), True, False),
    ("power, gated", 1, 32, 8, 8192, 128, POWER, False, True),
    ("window with masks, padded", 2, 32, 8, 8192, 128, SinkWindow(4, 1000), True, False),
    ("power, padded, 64", 4, 9, 3, 8192, 64, POWER, True, False),
    ("dense, padded, 64", 8, 12, 12, 2048, 64, Dense(), True, False),
    ("neighbourhood, masks, 64", 1, 12, 12, 4096, 64, Neighborhood((64, 64), 13), False, True),
    ("power, 80", 1, 32, 32, 8192, 80, POWER, False, False),
    ("power, 96", 1, 32, 32, 8192, 96, POWER, False, False),
    ("dense, 96", 2, 32, 32, 4096, 96, Dense(), False, False),
)


class Inputs:
    """Tensors and lists of one case."""

    def __init__(self, number: int) -> None:
        _, batch, heads, kv_heads, n, dim, pattern, padded, gated = CASES[number]
        torch.manual_seed(number)
        self.q, self.k, self.v = (
            torch.randn(batch, n, h, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for h in (heads, kv_heads, kv_heads)
        )
        self.lists = block_lists(pattern, n, n, 0, device="cuda")
        self.starts = self.ends = self.gates = None
        if padded:
            self.starts = torch.arange(batch, dtype=torch.int32, device="cuda") * (n // 16)
            self.ends = torch.full_like(self.starts, n)
        if gated:
            self.gates = torch.randn(batch, kv_heads, n, device="cuda")

    @property
    def of_hopper(self) -> bool:
        """Whether the Hopper kernel takes the case."""
        at = self.lists
        where = (at.block_q, at.block_k, at.q_offset, at.causal, True)
        return self.gates is None and hopper_takes(self.q, self.starts, *where)

    def run(self, tile: Tile | None) -> tuple[Tensor, Tensor]:
        """The portable kernel in one tile, the Hopper kernel for None."""
        q, k, v, lists, spans = self.q, self.k, self.v, self.lists, (self.starts, self.ends)
        if tile is None:
            return hopper_with()(q, k, v, lists, *spans)
        scale = q.shape[-1] ** -0.5
        return portable.launch(q, k, v, *lists.tensors, *spans, *lists.numbers, scale, tile, gates=self.gates)

    def timed(self, tile: Tile | None) -> float:
        """Median milliseconds of one way."""
        return triton.testing.do_bench(lambda: self.run(tile), warmup=20, rep=80, return_mode="median")


def compiled_ahead(jobs: int = 12) -> None:
    """Compiles all kernels side by side into Triton's cache, in processes of their own."""
    todo = range(len(CASES) * len(TILES))
    running = [
        subprocess.Popen([sys.executable, __file__, "--out", "-", "--compile", *map(str, todo[i::jobs])])
        for i in range(jobs)
    ]
    for process in running:
        process.wait()


def main() -> int:
    """Compares, times, prints a line for each case; 1 if tiles disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are written here")
    parser.add_argument("--commit", default="", help="what the rows call the code; asked of git if not given")
    parser.add_argument("--compile", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for number in options.compile or ():
        try:
            Inputs(number // len(TILES)).run(TILES[number % len(TILES)])
        except triton.runtime.errors.OutOfResources:
            continue
    if options.compile:
        return 0
    compiled_ahead()
    rows: list[dict[str, object]] = [{"what": "facts", **facts(options.commit)}]
    bad = 0
    for number, case in enumerate(CASES):
        inputs = Inputs(number)
        expected = inputs.run(TILES[0])[0]
        fits: list[Tile | None] = []
        for tile in (*TILES, *([None] if inputs.of_hopper else [])):
            try:
                error = cases.relative_error(inputs.run(tile)[0], expected)
            except triton.runtime.errors.OutOfResources:
                print(f"{case[0]}: {tile} does not fit", flush=True)
                continue
            if error <= 2 * cases.RELATIVE[torch.bfloat16]:
                fits.append(tile)
            else:
                print(f"{case[0]}: {tile} is off by {error:.1e}", flush=True)
                bad += 1
        best = in_turns(fits, inputs.timed)
        for tile, ms in best.items():
            about = asdict(tile) if tile else {"kernel": "hopper"}
            rows.append({"what": case[0], **about, "median_ms": ms, "times_first": best[TILES[0]] / ms})
        named = {t: f"{t.keys} {t.warps} {t.stages}" if t else "Hopper" for t in best}
        figures = "; ".join(f"{named[t]}: {ms:.3f}" for t, ms in best.items())
        print(f"{case[0]}: {figures}", flush=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
