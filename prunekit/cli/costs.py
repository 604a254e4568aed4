"""`prunekit costs`: what sub-layers take in milliseconds, by width, measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from prunekit.plan.costs import CostTable

_DTYPE = "Type of the weights in torch [float32]."


def costs(
    model: options.Model,
    on: Annotated[Literal["torch", "onnxruntime"], typer.Option("--on", help="What runs the pass.")] = "torch",
    batch: Annotated[int, typer.Option(min=1, help="Sequences in the pass.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in each sequence; images have their own.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Least passes of each model.")] = 10,
    blocks: Annotated[
        int | None, typer.Option(min=2, help="Blocks that are run [those of 512 MiB; four at most in ONNX Runtime].")
    ] = None,
    widths: Annotated[bool, typer.Option("--widths/--no-widths", help="Measure narrower sub-layers too.")] = True,
    device: options.Device = "auto",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help=_DTYPE)] = "float32",
    fresh: options.Fresh = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, for `budget: {costs: FILE}`.", dir_okay=False)
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what each sub-layer of a model takes, by KV groups and FFN neurons: the table of latency budgets.

    For example: prunekit costs smollm2-135m-instruct --on onnxruntime --tokens 128 --output costs.json

    A recipe with `budget: {latency_ms: 120}` measures its table by itself and keeps it; a file is for one that was
    measured elsewhere, or while the machine was quiet.
    """
    from prunekit.checkpoint.sources import resolve
    from prunekit.cli._files import require_free
    from prunekit.core.files import write_json
    from prunekit.pipeline.costs import Pass, cached_costs
    from prunekit.pipeline.inputs import device_named
    from prunekit.structure.view import ModelView

    if output is not None:
        require_free(output, overwrite)
    if on == "onnxruntime" and dtype != "float32":
        raise UsageError(f"`--dtype {dtype}` is for torch", why="ONNX exports hold float32", hint="take it out")
    out = Output(json=json, quiet=quiet)
    kinds = ("kv_groups", "neurons") if widths else ()
    asked = Pass(on, batch, tokens, device_named(device), dtype, repeats, kinds, blocks)
    with out.progress() as progress:
        view = ModelView.open(resolve(model, progress=progress).folder)
        table = cached_costs(view, asked, progress, out.talk, fresh)
    out.result(_shown(table, table.predict(view)), {**table.to_json(), "predicted_ms": table.predict(view)})
    if output is not None:
        write_json(output, table.to_json())
        out.written(output)


def _shown(table: CostTable, predicted: float) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    shown = Table("sub-layer", box=None, pad_edge=False, header_style="bold")
    shown.add_column("width", justify="right")
    shown.add_column("ms", justify="right")
    for kind, unit in (("attention", "KV groups"), ("ffn", "neurons")):
        for width, ms in sorted(getattr(table, kind).items(), reverse=True):
            shown.add_row(kind, f"{width:,} {unit}", f"{ms:.4g}")
    shown.add_row("the rest", "", f"{table.overhead_ms:.4g}")
    machine = table.environment["machine"]
    said = (
        f"one pass of {table.batch} x {table.tokens} tokens in {table.on} on {table.environment['device']}, "
        f"{machine['threads']} threads: {predicted:,.4g} ms for the whole model, from {table.measured['blocks']} blocks"
    )
    return Group(shown, "", said)
