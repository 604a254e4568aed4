"""`prunekit verify`: does a written folder load, and does it compute what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import ExpectationError


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that prunekit wrote.", exists=True, file_okay=False)],
    reference: Annotated[
        Path | None,
        typer.Option(help="Folder whose logits must agree; without it the folder must load and agree with itself."),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Load a folder in fresh processes, with and without prunekit, and compare what it computes.

    Exit code 3 where a check fails.
    """
    from prunekit.export.verify import verify as check
    from prunekit.report.facts import facts_table

    out = Output(json=json, quiet=quiet)
    report = check(folder, reference)
    data = {"folder": str(folder), **report.to_json()}
    out.result(facts_table(data), data)
    if not report.ok:
        raise ExpectationError(
            f"`{folder}` failed its checks", why="; ".join(report.problems), hint="prune or apply again, then verify"
        )
