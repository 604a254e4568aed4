"""`prunekit methods`: what can choose units, and training examples."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def methods(context: typer.Context) -> None:
    """List the methods that choose what goes, and those that make up for it."""
    if context.invoked_subcommand is None:
        show_list(Output(), None)


@app.command("list")
def list_(
    remove: Annotated[
        str | None, typer.Option(help="Only methods that choose this kind of unit, such as blocks or neurons.")
    ] = None,
    json: options.Json = False,
) -> None:
    """List scores, searches, gates, repairs, healing, attention in training and metrics, with status and needs."""
    show_list(Output(json=json), remove)


def show_list(out: Output, kind: str | None) -> None:
    """Prints the methods, one a line.

    Args:
        out: where to print.
        kind: only methods that choose this kind of unit; None for all.
    Raises:
        UsageError: for a kind that does not exist.
    """
    from rich.table import Table

    from prunekit.core.errors import UsageError
    from prunekit.core.method_card import card, method_names
    from prunekit.core.types import KINDS

    if kind is not None and kind not in KINDS:
        raise UsageError(f"no kind of unit named `{kind}`", hint=f"kinds: {', '.join(KINDS)}")
    cards = [card(role, name) for role, name in method_names()]
    shown = [entry for entry in cards if kind is None or kind in entry.kinds]
    table = Table("kind", "name", "status", "needs", "what it does", box=None, pad_edge=False, header_style="bold")
    for entry in shown:
        table.add_row(entry.role, entry.name, entry.status, needs_text(entry.needs, entry.role), entry.summary)
    out.result(table, [entry.to_json() for entry in shown])


def needs_text(needs: tuple[str, ...], role: str) -> str:
    """`no data`, the statistics a score needs, or that a search, a repair or healing runs the model."""
    if role != "score" and needs:
        return "runs the model"
    return ", ".join(needs) or "no data"
