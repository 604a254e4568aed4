"""`prunekit export`: a checkpoint folder in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output


def export(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder, pruned or not.", exists=True, file_okay=False)],
    format: Annotated[Literal["onnx"], typer.Option("--format", help="Format to write.")] = "onnx",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write [FOLDER/onnx].", file_okay=False)
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a checkpoint as ONNX, opened in ONNX Runtime and compared with torch before it counts as written."""
    from prunekit.core.files import atomic_folder
    from prunekit.export.onnx import export_onnx
    from prunekit.report.facts import facts_table

    out = Output(json=json, quiet=quiet)
    target = output if output is not None else folder / format
    with out.progress() as progress, atomic_folder(target, overwrite) as unfinished:
        report = export_onnx(folder, unfinished, progress)
    data = {"output": str(target), "format": format, **report.to_json()}
    out.result(facts_table(data), data)
    out.written(target)
