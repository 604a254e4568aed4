"""`prunekit bench`: how fast the run time's kernels are on the device at hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import ExpectationError, RuntimePolicyError, UsageError

if TYPE_CHECKING:
    from rich.console import Group

    from prunekit.runtime.attention.bench import Bench

app = typer.Typer(rich_markup_mode=None)


@app.callback()
def bench() -> None:
    """Check and time the run time's kernels on the device at hand."""


@app.command()
def attention(
    length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of prompts and caches; may be repeated [1024 on a CPU, else 8192, 32768, 131072]."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences of a step; may be repeated [1 on a CPU, else 1 and 8].")
    ] = None,
    device: options.Device = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Type of queries, keys and values [float32 on a CPU, else bfloat16]."),
    ] = None,
    strict: options.Strict = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check every sparse-attention pattern against float64, then time it beside the fastest dense attention of torch.

    For example: prunekit bench attention --length 8192 --length 32768

    Ratios are given only if all checks passed; otherwise the exit code is 3. A floor is the time that the arithmetic
    or the bytes alone need at the rates measured on the device first.
    """
    import torch

    from prunekit.pipeline.inputs import device_named
    from prunekit.runtime.attention.bench import bench as run
    from prunekit.runtime.attention.bench import no_kernels

    where = device_named(device)
    cuda = where.startswith("cuda")
    lengths = tuple(length or ((8192, 32768, 131072) if cuda else (1024,)))
    batches = tuple(batch or ((1, 8) if cuda else (1,)))
    if min(*lengths, *batches, 1) < 1:
        raise UsageError("`--length` and `--batch` are counts", why="they are at least 1")
    kind = getattr(torch, dtype or ("bfloat16" if cuda else "float32"))
    if strict and (reason := no_kernels(where, kind)):
        raise RuntimePolicyError("no kernel runs here", why=reason, hint="leave --strict out to time plain torch")
    out = Output(json=json, quiet=quiet)
    with out.progress() as progress:
        done = run(where, kind, lengths, batches, progress)
    out.result(_table(done), _data(done))
    if done.failed:
        first = done.failed[0]
        raise ExpectationError(
            f"{len(done.failed)} of {len(done.checks)} checks failed, so no ratio is given",
            why=f"{first.what}, {first.shape}: {first.error:.1e} off, {first.limit:.0e} allowed",
        )


def _data(done: Bench) -> dict[str, Any]:
    checks = [{**asdict(check), "passed": check.passed} for check in done.checks]
    return {
        "facts": done.facts,
        "checks": checks,
        "rows": [asdict(row) for row in done.rows],
        "left_out": done.left_out,
    }


def _table(done: Bench) -> Group:
    from rich.console import Group
    from rich.table import Table

    table = Table("shape", "attention", box=None, pad_edge=False, header_style="bold")
    for head in ("ms", "20 %", "80 %", "floor ms", "peak MiB", "times dense"):
        table.add_column(head, justify="right")
    for row in done.rows:
        times = "" if row.times_baseline is None else f"{row.times_baseline:.2f}"
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        figures = (row.median_ms, row.p20_ms, row.p80_ms, row.floor_ms)
        table.add_row(row.shape, row.what, *(f"{figure:.3f}" for figure in figures), peak, times)
    facts = done.facts
    head = (
        f"{facts['name']}, torch {facts['torch']}, {facts['dtype']}, {facts['heads']} query and {facts['kv_heads']} "
        f"key-value heads of {facts['dim']}; product {facts['matmul_tflops']:.2f} TFLOP/s, copy "
        f"{facts['copy_gb_s']:.0f} GB/s\nkernels: {facts['kernels']}\n"
        f"{len(done.checks) - len(done.failed)} of {len(done.checks)} checks passed"
    )
    left = "\n".join(f"left out: {line}" for line in done.left_out)
    return Group(head, "", table, left)
