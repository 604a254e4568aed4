"""`prunekit report`: what a pruning run did, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output


def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of `prunekit prune`.", metavar="DIR")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write [report.html in the folder].", dir_okay=False)
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the report of a pruning run: one HTML file that needs nothing else, to read, send or print.

    The folder's own report.html is made anew; any other file that exists is replaced only with --overwrite.
    """
    from rich.text import Text

    from prunekit.cli._files import require_free
    from prunekit.core.files import write_text
    from prunekit.report.folder import REPORT
    from prunekit.report.html import html_report
    from prunekit.report.layer_map import summary
    from prunekit.report.run import read_run

    own = folder / REPORT
    out, target = Output(json=json, quiet=quiet), output or own
    run = read_run(folder)
    require_free(target, overwrite or target.resolve() == own.resolve())
    write_text(target, html_report(run))
    shown = summary(run.rows)
    out.result(Text(f"{run.title}: {shown}"), {"report": str(target), "title": run.title, "summary": shown})
    out.written(target)
