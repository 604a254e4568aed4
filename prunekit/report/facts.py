"""A flat table of names and values, for reports that have no table of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text


def facts_table(data: Mapping[str, Any]) -> Table:
    """Two columns: the path of every value (`checks.0.name`) and the value; empty values are left out."""
    table = Table.grid(padding=(0, 2))
    for name, value in _flat(data, ""):
        table.add_row(name.replace("_", " "), Text(value))
    return table


def _flat(data: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(data, Sequence) and not isinstance(data, str):
        if all(not isinstance(item, Mapping | list | tuple) for item in data):
            if data:
                yield prefix, ", ".join(_text(item) for item in data)
        else:
            for number, item in enumerate(data):
                yield from _flat(item, f"{prefix}.{number}")
    elif data is not None and data != "":
        yield prefix, _text(data)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
