"""Block-sparse prefill on one GPU, beside dense attention and FlexAttention; tests first.

    python benchmarks/attention_prefill.py --out rows.jsonl [--lengths 8192 32768 131072] [--check-only]

Batch 1, 32 query heads, 8 key-value heads, head size 128, bfloat16, causal. The pattern is power with blocks of 128
tokens and the last 8 near. A row's floor is its arithmetic over the touched blocks at the measured matrix-product rate.
Speed-ups are printed only when every check passed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton
from attention_device import facts, poisoned
from attention_ours import DIM, HEADS, KV_HEADS, POWER, SCALE, Prefill, draw, hopper_with, portable_with, some_rows
from attention_peers import BACKENDS, compiled_flex, dense, flex_mask, power_rule
from torch import Tensor

from prunekit.runtime.attention.patterns._engine import block_lists
from prunekit_kernels.block_sparse_prefill import BlockLists, block_sparse_prefill, cases, flash4, portable
from prunekit_kernels.block_sparse_prefill.reference import reference

# Variants that are checked at full size only, to spare their compilation for every small shape.
LATER = ("portable 128x128 w8 s2", "hopper without turns")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Row:
    """One line of the results."""

    what: str
    tokens: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    tflops_touched: float
    floor_ms: float
    peak_mib: float
    shape: str = f"B1 H{HEADS} G{KV_HEADS} D{DIM} bfloat16 causal"
    baseline: str = ""
    times_baseline: float | None = None
    facts: dict[str, str] = field(default_factory=dict)


def ours() -> dict[str, Prefill]:
    """Our kernel variants by name."""
    return {
        "hopper": hopper_with(),
        "hopper without turns": hopper_with(pingpong=False),
        "portable 128x64 w4 s3": portable_with(portable.Tile(64, 4, 3)),
        "portable 128x128 w8 s2": portable_with(portable.Tile(128, 8, 2)),
    }


def check_small(log: list[str], seed: int) -> None:
    """Every variant on the ragged cases it takes, against float64."""
    for number, case in enumerate(cases.LARGE):
        for dtype in (torch.bfloat16, torch.float16)[: 2 if number % 6 == 0 else 1]:
            q, k, v, lists, starts, ends = cases.make(case, dtype, "cuda", seed + number)
            expected, lse = reference(q.double(), k.double(), v.double(), lists, case.dim**-0.5, starts, ends)
            for name, run in {"operation": block_sparse_prefill, **ours()}.items():
                if name.startswith("hopper") and (case.table or case.spans or case.dim not in (64, 128)):
                    continue
                # Tiles of the variants are for head sizes up to 128.
                if name in LATER or (name != "operation" and case.dim > 128):
                    continue
                out, got = run(q, k, v, lists, starts=starts, ends=ends)
                error = cases.relative_error(out, expected)
                finite = lse > float("-inf")
                lse_error = float((got - lse)[finite].abs().max())
                same = bool(((got > float("-inf")) == finite).all())
                if not (error <= cases.RELATIVE[dtype] and lse_error <= cases.LSE_ABSOLUTE[dtype] and same):
                    log.append(
                        f"{name} {case.name} {dtype} seed {seed + number}: output {error:.2e} lse {lse_error:.2e}"
                    )


def check_large(log: list[str], n: int, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists) -> None:
    """Every variant at full size on some rows of queries, against float32 and the pattern's own rule."""
    keys = torch.arange(n, device="cuda")
    rule = lambda rows: POWER.allows(rows[:, None], keys[None, :])[None]  # noqa: E731
    for name, run in ours().items():
        out, lse = run(q, k, v, lists)
        if not bool(torch.isfinite(out).all() & torch.isfinite(lse).all()):
            log.append(f"{name} {n}: not finite everywhere")
        for rows, expected, sums in some_rows(q, k, v, rule, (0, 640, n // 2 + 37, n - 64), 64):
            error = cases.relative_error(out[0, :, rows], expected)
            lse_error = float((lse[0, :, rows] - sums).abs().max())
            if not (error <= cases.RELATIVE[torch.bfloat16] and lse_error <= cases.LSE_ABSOLUTE[torch.bfloat16]):
                log.append(f"{name} {n} rows {rows.start}: output {error:.2e} lse {lse_error:.2e}")


def check_peer(log: list[str], name: str, out: Tensor, expected: Tensor) -> None:
    """A baseline must compute the same thing."""
    difference = cases.relative_error(out, expected)
    if not difference < 1e-2:
        log.append(f"{name} differs from ours by {difference:.2e}")


def measure(run: Callable[[], object], rep_ms: int) -> tuple[float, float, float, float]:
    """Median, 20th and 80th percentile in ms, and peak memory in MiB."""
    torch.cuda.reset_peak_memory_stats()
    median, low, high = triton.testing.do_bench(run, warmup=30, rep=rep_ms, quantiles=[0.5, 0.2, 0.8])
    return median, low, high, torch.cuda.max_memory_allocated() / 2**20


def ceilings() -> tuple[float, float]:
    """Measured matrix-product rate in TFLOP/s and copy rate in TB/s."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = measure(lambda: a @ b, 150)[0]
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), 100)[0]
    return 2 * 8192**3 / product / 1e9, 2 * source.nbytes / copy / 1e9


def flex_power(lists: BlockLists, mode: str | None) -> Attention:
    """FlexAttention over the lists of the power pattern, compiled."""
    flex, mask = compiled_flex(mode), flex_mask(lists, power_rule(POWER))
    return lambda q, k, v: flex(q, k, v, block_mask=mask, enable_gqa=True)


def main() -> int:
    """Checks, times, prints a table; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are written here")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--commit", default="", help="what the rows call the code; asked of git if not given")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--no-dense", action="store_true", help="leave the dense baselines out")
    parser.add_argument("--autotune", action="store_true", help="also FlexAttention in max-autotune mode")
    options = parser.parse_args()
    log: list[str] = []
    poisoned(True)
    check_small(log, seed=1)
    print(f"small checks: {len(log)} failed", flush=True)
    rows: list[Row] = []
    if not options.check_only:
        poisoned(False)
        matmul, copy = ceilings()
        about = facts(options.commit) | {"matmul_tflops": f"{matmul:.0f}", "copy_tb_s": f"{copy:.2f}"}
        print(about, flush=True)
    for n in options.lengths:
        q, k, v = draw(n)
        lists = block_lists(POWER, n, n, device="cuda")
        poisoned(True)
        check_large(log, n, q, k, v, lists)
        poisoned(False)
        if options.check_only:
            continue
        touched = 4.0 * DIM * 128 * 128 * lists.touched * HEADS
        whole = 4.0 * DIM * n * (n + 1) / 2 * HEADS
        runs: dict[str, tuple[float, Callable[[], object]]] = {}
        for name, run in ours().items():
            runs[name] = (touched, lambda run=run: run(q, k, v, lists))
        flex = flex_power(lists, None)
        runs["flex power"] = (touched, lambda flex=flex: flex(q, k, v))
        expected = ours()["portable 128x64 w4 s3"](q, k, v, lists)[0]
        check_peer(log, f"flex power {n}", flex(q, k, v), expected)
        if not flash4.refusal(q, k, lists):
            call = flash4.prepared(q, k, v, lists, SCALE)
            check_peer(log, f"flash-attn-4 power {n}", call(), expected)
            runs["flash-attn-4 power"] = (touched, call)
        if options.autotune:
            tuned = flex_power(lists, "max-autotune-no-cudagraphs")
            runs["flex power autotuned"] = (touched, lambda tuned=tuned: tuned(q, k, v))
        runs["hopper again"] = (touched, lambda: ours()["hopper"](q, k, v, lists))
        if not options.no_dense:
            runs |= {name: (whole, dense(backend, q, k, v)) for name, backend in BACKENDS.items()}
        for name, (flops, call) in runs.items():
            median, low, high, peak = measure(call, 400 if n > 2**16 else 200)
            floor = flops / matmul / 1e9
            rows.append(Row(name, n, median, low, high, flops / median / 1e9, floor, peak, facts=about))
            print(f"{n:7d}  {name:24s} {median:8.3f} ms  {rows[-1].tflops_touched:5.0f} TFLOP/s", flush=True)
        torch._dynamo.reset()
    report(rows, log, options.out)
    return 1 if log else 0


def report(rows: list[Row], log: list[str], out: Path) -> None:
    """Writes the rows and prints ratios, unless a check failed."""
    for row in rows if not log else ():
        peers = [r for r in rows if r.tokens == row.tokens and r.what.startswith(("flex", "flash-attn", "dense"))]
        best = min(peers, key=lambda peer: peer.median_ms)
        row.baseline, row.times_baseline = best.what, best.median_ms / row.median_ms
    out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    if log:
        print("checks failed, so no speed-up is printed:", *log[:20], sep="\n  ")
        return
    for row in rows:
        times = f"{row.times_baseline:5.2f} x {row.baseline}" if row.times_baseline else ""
        print(f"{row.tokens:7d}  {row.what:24s} {row.median_ms:8.3f} ms ({row.p20_ms:.3f} to {row.p80_ms:.3f})  "
              f"floor {row.floor_ms:7.3f}  {row.tflops_touched:5.0f} TFLOP/s  {times}")  # fmt: skip
    print(f"all checks passed; written to {out}")


if __name__ == "__main__":
    sys.exit(main())
