"""`prunekit apply`: a plan file carried out on a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output


def apply(
    plan: Annotated[
        Path,
        typer.Argument(
            help="Plan file: of `prunekit plan --output`, or of another tool as docs/guides/interchange.md lists them.",
            exists=True,
            dir_okay=False,
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model to cut: folder, hub id, GGUF file or packaged name.")
    ],
    output: options.OutputFolder,
    revision: options.Revision = None,
    max_shard_bytes: Annotated[
        int, typer.Option(help="Largest weight file to write, in bytes.", min=1)
    ] = 5_000_000_000,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Carry out a plan, streaming: memory holds one group of tensors at a time. The model is only read."""
    from prunekit.checkpoint.sources import resolve
    from prunekit.core.files import atomic_folder
    from prunekit.plan.cost import cost
    from prunekit.plan.interchange import read_plan
    from prunekit.plan.layout import choose_layout
    from prunekit.plan.loads import loads
    from prunekit.report.layer_map import layer_map
    from prunekit.report.outcome import outcome
    from prunekit.structure.view import ModelView
    from prunekit.surgery import engine

    out = Output(json=json, quiet=quiet)
    with out.progress() as progress:
        view = ModelView.open(resolve(model, revision=revision, progress=progress).folder)
        cuts = read_plan(plan, view)
        with atomic_folder(output, overwrite) as folder:
            engine.apply(view, cuts, folder, max_shard_bytes, progress)
    before, after = asdict(cost(view)), asdict(cost(view, cuts))
    layout = choose_layout(view, cuts)
    rows, where = layer_map(view, cuts), loads(view, cuts, layout)
    data = {
        "output": str(output),
        "layout": layout.kind,
        "before": before,
        "after": after,
        "loads": where,
        "layer_map": [row.to_json() for row in rows],
    }
    out.result(outcome(rows, before, after, where), data)
    out.written(output)
