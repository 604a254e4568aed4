"""What a finished or planned run prints: layer map, before/after table, where it loads, samples, expectations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prunekit.report.layer_map import LayerMap, Row
from prunekit.report.table import before_after, lines


def outcome(
    rows: Sequence[Row],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    loads: Mapping[str, str],
    expectations: Sequence[Mapping[str, Any]] = (),
    cut: Mapping[str, Any] | None = None,
    latency: Mapping[str, Any] | None = None,
) -> RenderableType:
    """Everything a person reads after a run, top to bottom.

    Args:
        rows: layer map rows.
        before: measurements of the source, keys as in `table.MEASURES`, plus `sample`.
        after: the same for the result.
        loads: where the result loads: target and how.
        expectations: per entry `name`, `limit`, `value`, `ok`.
        cut: measurements after the cut and before healing; None where nothing was healed.
        latency: target, prediction and measurement of a latency budget; None or empty without one.
    """
    parts: list[RenderableType] = [LayerMap(rows), "", before_after(lines(before, after, cut))]
    if latency:
        parts += ["", _latency(latency)]
    if before.get("sample") or after.get("sample"):
        parts += ["", *_samples(before.get("sample"), after.get("sample"))]
    if loads:
        parts += ["", _loads(loads)]
    if expectations:
        parts += ["", _expectations(expectations)]
    return Group(*parts)


def _latency(latency: Mapping[str, Any]) -> Table:
    """What a latency budget asked for, what was predicted, and, once there is a result, what it takes."""
    head = f"one pass, {latency['batch']} x {latency['tokens']} tokens in {latency['on']}"
    table = Table(head, box=None, pad_edge=False, header_style="bold")
    table.add_column("ms", justify="right")
    names = {
        "dense_predicted_ms": "dense, by the cost table",
        "dense_measured_ms": "dense, measured, fastest pass",
        "target_ms": "asked for at most",
        "predicted_ms": "predicted",
        "measured_ms": "measured, fastest pass",
        "measured_p50_ms": "measured, median",
    }
    for key, name in names.items():
        if key in latency:
            table.add_row(name, f"{latency[key]:,.4g}")
    if "predicted_to_measured" in latency:
        table.add_row("predicted to measured", f"{latency['predicted_to_measured']:.3f}")
    if "measured_share" in latency:
        for side in ("predicted", "measured"):
            table.add_row(f"share of the dense model's time, {side}", f"{latency[f'{side}_share']:.3f}")
    return table


def _samples(before: str | None, after: str | None) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for name, text in (("before", before), ("after", after)):
        if text:
            # Text, not str: a model's output may hold what rich would read as markup.
            parts += [Text(f"sample, {name}"), Padding(Text(" ".join(text.split())), (0, 0, 0, 2))]
    return parts


def _loads(loads: Mapping[str, str]) -> Table:
    table = Table("loads in", "how", box=None, pad_edge=False, header_style="bold")
    for target, how in loads.items():
        table.add_row(Text(target), Text(how))
    return table


def _expectations(expectations: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("expected", box=None, pad_edge=False, header_style="bold")
    table.add_column("limit", justify="right")
    table.add_column("value", justify="right")
    table.add_column("")
    for entry in expectations:
        limit, value = (_plain(entry[key]) for key in ("limit", "value"))
        table.add_row(Text(str(entry["name"])), limit, value, "met" if entry["ok"] else Text("missed", "red"))
    return table


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
