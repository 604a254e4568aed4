"""What `evaluate` and `compare` print: figures by model, their differences, and where two models part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_MIB = 2.0**20


def figures_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """One line a figure, one column a model, standard errors behind the sign ±.

    Args:
        models: as `Evaluation.to_json` gives them.
    """
    table = Table("task", "figure", "n", box=None, pad_edge=False, header_style="bold")
    table.columns[2].justify = "right"
    for model in models:
        table.add_column(Text(str(model["model"])), justify="right")
    for label, name, found in _by_figure(models):
        known = next(figure for figure in found if figure is not None)
        n = "" if known["n"] is None else str(known["n"])
        table.add_row(Text(label), Text(_named(name, known)), n, *(Text(_valued(figure)) for figure in found))
    return table


def comparison(data: Mapping[str, Any]) -> RenderableType:
    """Everything that `compare` prints.

    Args:
        data: `models`, `comparisons` and `method`, as `Comparison.to_json` gives them.
    """
    parts: list[RenderableType] = []
    for entry in data["comparisons"]:
        parts += [_differences(data["models"][0]["model"], entry), ""]
        if entry["kl"] is not None:
            parts += [*_kl(data["models"][0]["model"], entry), ""]
    return Group(*parts, Text(data["method"]))


def _differences(first: str, entry: Mapping[str, Any]) -> Table:
    table = Table("task", "figure", "n", box=None, pad_edge=False, header_style="bold")
    table.columns[2].justify = "right"
    for head in (first, entry["model"], "difference", "95 % interval"):
        table.add_column(Text(str(head)), justify="right")
    table.add_column("")
    for row in entry["differences"]:
        verdict = ""
        if row["clear"]:
            better = (row["difference"] > 0) == (row["better"] == "higher")
            verdict = "better" if better else "worse"
        interval = "" if row["low"] is None else f"{_number(row['low'], row)} to {_number(row['high'], row)}"
        table.add_row(
            Text(row["label"]),
            Text(_named(row["figure"], row)),
            "" if row["n"] is None else str(row["n"]),
            _number(row["first"], row),
            _number(row["other"], row),
            _number(row["difference"], row, sign=True),
            interval,
            Text(verdict, "red" if verdict == "worse" else ""),
        )
    return table


def _kl(first: str, entry: Mapping[str, Any]) -> Iterator[RenderableType]:
    kl, mean = entry["kl"], entry["kl"]["mean"]
    interval = "" if mean["low"] is None else f" ({mean['low']:.3f} to {mean['high']:.3f})"
    yield Text(f"KL({first} || {entry['model']}) on {kl['tokens']:,} tokens of {kl['data']}")
    yield Text(
        f"mean {mean['value']:.3f} nats{interval}, median {kl['p50']:.3f}, 99th percentile {kl['p99']:.2f}; "
        f"same first choice {100 * kl['same_choice']:.1f} %"
    )
    for number, passage in enumerate(kl["passages"], start=1):
        yield Text(f"{number}. mean {passage['kl']:.2f} nats")
        # Text, not str: a passage may hold what rich would read as markup.
        yield Padding(Text(f"...{_line(passage['before'])}[ {_line(passage['text']).strip()} ]"), (0, 0, 0, 3))
        for token in passage["worst"]:
            ours, theirs = _line(token["first"]), _line(token["other"])
            said = f"`{_line(token['text'])}` {token['kl']:.2f}: `{ours}` became `{theirs}`"
            yield Padding(Text(said), (0, 0, 0, 3))


def _line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _by_figure(
    models: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, str, list[Mapping[str, Any] | None]]]:
    """Label, name and each model's figure, in the order in which they are met first."""
    seen: dict[tuple[str, str], list[Mapping[str, Any] | None]] = {}
    for place, model in enumerate(models):
        for task in model["tasks"]:
            for name, figure in task["figures"].items():
                seen.setdefault((task["label"], name), [None] * len(models))[place] = figure
    for (label, name), found in seen.items():
        yield label, name, found


def _named(name: str, figure: Mapping[str, Any]) -> str:
    if figure["unit"] == "bytes":
        return f"{name.removesuffix('_bytes')} (MiB)"
    return name


def _valued(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    error = figure["stderr"]
    return _number(figure["value"], figure) + ("" if error is None else f" ± {_number(error, figure)}")


def _number(value: float | None, figure: Mapping[str, Any], sign: bool = False) -> str:
    if value is None:
        return "inf"
    scaled = value / _MIB if figure["unit"] == "bytes" else value
    mark = "+" if sign else ""
    if figure["unit"] or abs(scaled) >= 100:
        return f"{scaled:{mark},.1f}"
    return f"{scaled:{mark}.3f}" if abs(scaled) < 10 else f"{scaled:{mark}.2f}"
