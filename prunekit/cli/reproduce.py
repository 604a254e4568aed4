"""`prunekit reproduce`: an output folder made again from its manifest, compared byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import ExpectationError


def reproduce(
    folder: Annotated[Path, typer.Argument(help="Output folder of `prunekit prune`; only read.", metavar="DIR")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the model before the cut lies now [as in the recipe].")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make an output folder again from its prunekit.json, in a temporary place, and compare every file.

    Measured figures are taken from the manifest; plan, weights, ONNX files and everything written from them are made
    anew. TMPDIR says where, with room for the folder once more.

    Exit code 0: every file is the same byte for byte. 3: a file differs, is missing, or is not of the run. 1: an input
    is missing or has another digest, all named, or the run cannot be repeated. 2: the folder holds no manifest.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from prunekit import pipeline

    out = Output(json=json, quiet=quiet)
    with out.progress() as progress:
        found = pipeline.reproduce(folder, model, progress, out.talk)
    table = Table("file", "", "", box=None, pad_edge=False)
    for file in found.files:
        table.add_row(Text(file.name), file.state, file.detail)
    changed = [Text(f"{name}: {then} then, {now} now") for name, (then, now) in found.versions.items()]
    n_same = sum(file.state == "same" for file in found.files)
    out.result(Group(table, "", *changed, f"{n_same} of {len(found.files)} files are the same"), found.to_json())
    if not found.same:
        odd = [file for file in found.files if file.state != "same"]
        raise ExpectationError(
            f"`{folder}` was not reproduced",
            why=", ".join(f"`{file.name}` {_STATES[file.state]}" for file in odd),
            hint="other versions of packages, another CPU or GPU, or a changed file" if not changed else "",
        )


_STATES = {"differs": "differs", "missing": "is missing", "extra": "is not made by the run"}
