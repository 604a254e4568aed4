"""`prunekit inspect`: what a model is made of and what a token costs, from its files alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import StructureError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from prunekit.structure.view import ModelView


def inspect(
    model: options.Model,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with the unit it belongs to.")] = False,
    revision: options.Revision = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show blocks, heads, KV groups, widths, parameters, FLOPs a token, KV bytes a token and file bytes.

    Equal blocks in a row share one line. No weight is read. Of a model that prunekit does not know a first architecture
    file is printed, guessed from names and shapes.
    """
    from rich.console import Group

    from prunekit.checkpoint.sources import resolve
    from prunekit.report.structure import describe, structure_summary, structure_table
    from prunekit.structure.view import ModelView

    out = Output(json=json, quiet=quiet)
    with out.progress() as progress:
        source = resolve(model, revision=revision, progress=progress)
    _require_known(source.folder, out)
    view = ModelView.open(source.folder)
    structure = describe(view)
    data: dict[str, Any] = {"model": source.name, "folder": str(source.folder), **structure.to_json()}
    parts: list[RenderableType] = [structure_summary(source.name, structure), "", structure_table(structure.blocks)]
    if tensors:
        listed = _tensors(view)
        data["tensors"] = listed
        parts += ["", _tensor_table(listed)]
    out.result(Group(*parts), data)


def _require_known(folder: Path, out: Output) -> None:
    """Prints a draft of the architecture file that is missing, where one is, and fails."""
    from prunekit.checkpoint.reader import Checkpoint
    from prunekit.structure.architecture import architecture
    from prunekit.structure.draft import draft

    checkpoint = Checkpoint.open(folder)
    model_type = str(checkpoint.config.get("model_type", ""))
    try:
        architecture(model_type)
    except StructureError as error:
        if not out.json:
            sys.stdout.write(draft(checkpoint))
            sys.stdout.flush()
        hint = f"{error.hint}; check the draft, `unsure` lines first, and put it into `prunekit/structure/archs/`"
        raise StructureError(error.what, why=error.why, hint=hint, at=error.at) from error


def _tensors(view: ModelView) -> list[dict[str, Any]]:
    owners = [(sublayer.address, ref) for sublayer in view.sublayers for ref in sublayer.tensors]
    owners += [("outer", ref) for ref in view.outer]
    return [
        {
            "name": ref.name,
            "unit": address,
            "dtype": ref.dtype,
            "shape": list(ref.shape),
            "layout": [" ".join(dim) for dim in ref.layout],
        }
        for address, ref in owners
    ]


def _tensor_table(listed: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("tensor", "unit", "dtype", box=None, pad_edge=False, header_style="bold")
    table.add_column("shape", justify="right")
    table.add_column("layout")
    for row in listed:
        shape, layout = " x ".join(map(str, row["shape"])), ", ".join(row["layout"])
        table.add_row(row["name"], row["unit"], row["dtype"], shape, layout)
    return table
