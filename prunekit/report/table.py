"""The before/after table: one line a measurement, the unit beside its name, the change in per cent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BINARY = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
# A line prints in the unit that keeps its larger value at ten or more, so three digits tell before from after.
_LEAST_SHOWN = 10.0


@dataclass(frozen=True)
class Measure:
    """How one measurement is shown.

    Args:
        key: name of the value in the measurements.
        label: what the line is called.
        unit: `count`, `flops`, `bytes`, or the unit as printed for a value shown as it is.
    """

    key: str
    label: str
    unit: str


MEASURES: tuple[Measure, ...] = (
    Measure("params", "parameters", "count"),
    Measure("block_params", "parameters in blocks", "count"),
    Measure("weight_bytes", "weights", "bytes"),
    Measure("file_bytes", "weight files", "bytes"),
    Measure("onnx_bytes", "ONNX files", "bytes"),
    Measure("flops_per_token", "compute a token", "flops"),
    Measure("kv_bytes_per_token", "KV cache a token", "bytes"),
    Measure("perplexity", "perplexity", ""),
    Measure("kl", "KL to the dense model", "nats"),
    Measure("embedding_cosine", "cosine to the dense embedding", ""),
    Measure("prefill_tokens_s", "prefill", "tokens/s"),
    Measure("decode_tokens_s", "decode", "tokens/s"),
    Measure("latency_ms", "one pass, fastest", "ms"),
)


@dataclass(frozen=True)
class Line:
    """One printed line; numbers are text already, so that every renderer shows the same digits."""

    label: str
    unit: str
    before: str
    after: str
    change: str
    cut: str = ""


def lines(before: Mapping[str, Any], after: Mapping[str, Any], cut: Mapping[str, Any] | None = None) -> list[Line]:
    """Lines for every known measurement that both or either side has, then for every figure of a task.

    Args:
        before: values by key as in `MEASURES`, None or missing where not measured; and under `figures` those of tasks.
        after: the same for the result.
        cut: the same after the cut and before healing; None or empty where nothing was healed.
    Returns:
        Lines in the order of `MEASURES`. 134515008 -> 107000000 parameters reads `parameters  M  134.5  107.0  -20.5`.
    """
    shown = []
    for measure in MEASURES:
        a, b = before.get(measure.key), after.get(measure.key)
        if (a is None and b is None) or (not a and not b):
            continue
        scale, unit = _scale(measure.unit, max(abs(v) for v in (a, b) if v is not None))
        between = _number(cut.get(measure.key), scale) if cut else ""
        shown.append(Line(measure.label, unit, _number(a, scale), _number(b, scale), _change(a, b), between))
    figures = [side.get("figures") or {} for side in (before, after, cut or {})]
    for key in dict.fromkeys([*figures[0], *figures[1]]):
        a, b = figures[0].get(key), figures[1].get(key)
        between = _number(figures[2].get(key), 1.0) if cut else ""
        shown.append(Line(key, "", _number(a, 1.0), _number(b, 1.0), _change(a, b), between))
    return shown


def _scale(unit: str, largest: float) -> tuple[float, str]:
    if unit not in ("count", "flops", "bytes"):
        return 1.0, unit
    plain = {"count": "", "flops": "FLOPs", "bytes": "bytes"}[unit]
    for factor, prefix in _BINARY if unit == "bytes" else _SI:
        if largest >= _LEAST_SHOWN * factor:
            return factor, f"{prefix}FLOPs" if unit == "flops" else prefix
    return 1.0, plain


def _number(value: float | None, scale: float) -> str:
    if value is None:
        return "-"
    scaled = value / scale
    if isinstance(value, int) and scale == 1.0:
        return f"{value:,}"
    if abs(scaled) < 1:
        return f"{scaled:.4f}"
    return f"{scaled:,.2f}" if abs(scaled) < 10 else f"{scaled:,.1f}"


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None or before == 0:
        return "-"
    return f"{100.0 * (after - before) / before:+.1f}"


def before_after(shown: Sequence[Line], names: tuple[str, str] = ("before", "after")) -> Table:
    """Rich table of the lines; numbers right-aligned, with a column `cut` where a line has it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("unit")
    between = ["cut"] if any(line.cut for line in shown) else []
    for head in (names[0], *between, names[1], "change (%)"):
        table.add_column(head, justify="right", no_wrap=True)
    for line in shown:
        table.add_row(line.label, line.unit, line.before, *[line.cut for _ in between], line.after, line.change)
    return table


def markdown(shown: Sequence[Line], names: tuple[str, str] = ("before", "after")) -> str:
    """The same table in Markdown."""
    healed = any(line.cut for line in shown)
    heads = [names[0], *(["cut"] if healed else []), names[1], "change (%)"]
    rows = [f"| | unit | {' | '.join(heads)} |", "|---|---|" + "---:|" * len(heads)]
    for x in shown:
        values = [x.before, *([x.cut] if healed else []), x.after, x.change]
        rows.append(f"| {x.label} | {x.unit} | {' | '.join(values)} |")
    return "\n".join(rows)
