"""`prunekit explain`: one method in full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from prunekit.core.method_card import Card


def explain(
    name: Annotated[str, typer.Argument(help="Method; `prunekit methods list` shows them.")],
    json: options.Json = False,
) -> None:
    """Explain a method: paper, evidence, deviations from it, knobs with defaults, and how it is used."""
    from prunekit.core.errors import UsageError
    from prunekit.core.method_card import card, method_names
    from prunekit.core.recipe_problems import near

    found = [card(role, known) for role, known in method_names() if known == name]
    if not found:
        names = [known for _, known in method_names()]
        hint = near(name, names) or f"there are: {', '.join(names)}"
        raise UsageError(f"no method named `{name}`", hint=hint)
    from rich.console import Group

    cards = [entry.to_json() for entry in found]
    Output(json=json).result(Group(*map(render, found)), cards[0] if len(cards) == 1 else cards)


def render(entry: Card) -> RenderableType:
    """The card as a person reads it in a terminal."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from prunekit.cli.methods import needs_text
    from prunekit.core.method_card import example_use

    head = Text.assemble((entry.name, "bold"), f"  {entry.role}, {entry.status}")
    parts: list[RenderableType] = [head, Text(entry.summary)]
    if entry.body:
        parts += ["", Text(entry.body)]
    facts = Table.grid(padding=(0, 2))
    rows = {
        "chooses": ", ".join(entry.kinds),
        "needs": needs_text(entry.needs, entry.role),
        "paper": entry.paper,
        "evidence": entry.evidence,
        "differs": entry.deviations,
    }
    for label, value in rows.items():
        if value:
            facts.add_row(label, value)
    parts += ["", facts]
    if entry.knobs:
        knobs = Table("knob", "type", "default", "meaning", box=None, pad_edge=False, header_style="bold")
        for knob in entry.knobs:
            knobs.add_row(knob.name, knob.type, knob.default or "must be given", knob.meaning)
        parts += ["", knobs]
    where, example = example_use(entry)
    return Group(*parts, "", Text(f"{where}:"), Padding(Text(example.rstrip()), (0, 0, 0, 2), expand=False))
