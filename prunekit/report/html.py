"""The report of a run as one HTML file that asks for nothing outside itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.core.page import html_page
from prunekit.report.charts import heat_map, line_chart
from prunekit.report.layer_map import KINDS, Cell, details, kinds_of, summary
from prunekit.report.run import OrderPart, Run, ScoresPart, part
from prunekit.report.table import MEASURES, lines

_TEMPLATES = Path(__file__).parent / "templates"
_HEADLINE = ("params", "file_bytes", "flops_per_token", "kv_bytes_per_token", "perplexity", "embedding_cosine")
# What is counted shrinks, so a bar of what is left says something; quality and speed have no such whole.
_SHARES = {"params", "file_bytes", "flops_per_token", "kv_bytes_per_token"}
_KIND_NAMES = {"attention": "attention", "cross_attention": "cross-attention", "ffn": "FFN"}


def html_report(run: Run) -> str:
    """The whole page."""
    return html_page(_TEMPLATES, "pruning report", {"ticks": _ticks}, **_context(run))


def _ticks(text: str) -> str:
    """Escaped text with what stands in backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _context(run: Run) -> dict[str, Any]:
    rows = run.rows
    return {
        "run": run,
        "title": run.title,
        "description": str(run.recipe.get("description") or ""),
        "summary": summary(rows),
        "removed": details(rows),
        "tiles": list(_headline(run)),
        "blocks": [_Block(row.name, [_CellView(kind, getattr(row, kind)) for kind in kinds_of(rows)]) for row in rows],
        "kinds": [_KIND_NAMES[kind] for kind in kinds_of(rows)],
        "widths": _widths(run),
        "states": sorted({getattr(row, kind).state for row in rows for kind in KINDS} - {"absent"}),
        "heats": [(o, heat_map(o, run.plan)) for o in run.orders if isinstance(o, ScoresPart) and o.units],
        "charts": [(o, line_chart(o), _distance(o)) for o in run.orders if isinstance(o, OrderPart) and o.steps],
        "measured": lines(run.before, run.after, run.cut),
        "expectations": [(e.name, _plain(e.limit), _plain(e.value), e.ok) for e in run.expectations],
        "recipe": run.recipe_text(),
        "seeds": list(_seeds(run.recipe)),
        "seconds": [(name, f"{value:.1f}") for name, value in run.seconds.items()],
    }


@dataclass(frozen=True)
class _Tile:
    """One figure of the headline."""

    label: str
    unit: str
    before: str
    after: str
    change: str
    left: float | None


def _headline(run: Run) -> Iterator[_Tile]:
    for measure in MEASURES:
        if measure.key not in _HEADLINE:
            continue
        a, b = run.before.get(measure.key), run.after.get(measure.key)
        for line in lines({measure.key: a}, {measure.key: b}):
            whole = a if measure.key in _SHARES else None
            left = max(0.0, min(100.0, 100.0 * b / whole)) if whole and b is not None else None
            yield _Tile(line.label, line.unit, line.before, line.after, line.change, left)


@dataclass(frozen=True)
class _CellView:
    """One sub-layer on the layer map."""

    kind: str
    cell: Cell

    @property
    def name(self) -> str:
        return _KIND_NAMES[self.kind]

    @property
    def text(self) -> str:
        """What stays, in words: `2 of 3 kv groups`."""
        widths = ", ".join(f"{k} of {n} {unit.replace('_', ' ')}" for unit, (k, n) in self.cell.widths.items())
        return f"{self.cell.state}: {widths}" if widths else self.cell.state

    @property
    def percent(self) -> int:
        return round(100 * self.cell.share)


@dataclass(frozen=True)
class _Block:
    number: str
    cells: list[_CellView]


def _widths(run: Run) -> list[dict[str, str]]:
    """Heads, KV groups and neurons of every block before and after, where the manifest has them."""
    found, rows = run.plan.widths, []
    for row in run.rows if found else []:
        attention, cross, ffn = (found.get(f"{row.address}.{kind}", {}) for kind in KINDS)
        neurons = ffn.get("neurons", 0)
        own = {"neurons": _change(neurons, _kept(row.ffn, "neurons", neurons))}
        rows.append({"block": row.name, **_heads(attention, row.attention), **own})
        if cross:
            heads = _heads(cross, row.cross_attention)
            rows.append({"block": f"{row.name}, cross-attention", **heads, "neurons": ""})
    return rows


def _heads(attention: Mapping[str, int], cell: Cell) -> dict[str, str]:
    kv, rep = attention.get("kv_groups", 0), attention.get("query_heads", 0)
    kept_kv, kept_rep = _kept(cell, "kv_groups", kv), _kept(cell, "query_heads", rep)
    return {"query_heads": _change(kv * rep, kept_kv * kept_rep), "kv_groups": _change(kv, kept_kv)}


def _kept(cell: Cell, unit: str, before: int) -> int:
    if cell.state in ("removed", "absent"):
        return 0
    return cell.widths.get(unit, (before, before))[0]


def _change(before: int, after: int) -> str:
    if not before:
        return "-"
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def _distance(order: OrderPart) -> str:
    knobs = part(order.provenance, "knobs")
    return str(knobs.get("distance") or "")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def _seeds(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every `seed` of a recipe with its path."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            below = f"{path}.{key}" if path else str(key)
            if key == "seed":
                yield below, str(value)
            yield from _seeds(value, below)
    elif isinstance(data, list):
        for i, value in enumerate(data):
            yield from _seeds(value, f"{path}.{i}")
