"""Diagnostics of a model as a table by block and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from prunekit.core.types import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT, LINES = "#333333", ("#17609f", "#b25c00")
# Heads of the table, where the whole name is too wide for eleven columns.
_SHORT = {
    "activation_norms": "norm",
    "attention_entropy": "entropy",
    "attention_rank": "rank",
    "sensitivity": "without",
    "variance_kurtosis": "kurtosis",
}
_COLUMNS = 3
_PANEL_INCHES = (4.6, 3.4)


def diagnosis_table(panels: Sequence[Panel]) -> Table:
    """One line a block: means over its heads, the number of heads with a role, and every curve."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("block", no_wrap=True)
    columns: list[dict[str, str]] = []
    for panel in panels:
        for head, cells in _columns(panel):
            # Heads wrap between words, cells never.
            table.add_column(head, justify="right", min_width=max(map(len, (*cells.values(), *head.split()))))
            columns.append(cells)
    names = {name: None for cells in columns for name in cells}
    for name in sorted(names, key=lambda name: (name != "input", int(name) if name.isdecimal() else -1)):
        table.add_row(name, *(cells.get(name, "-") for cells in columns))
    return table


def _columns(panel: Panel) -> list[tuple[str, dict[str, str]]]:
    """Heads and cells by block of the columns that a panel gives."""
    name = _SHORT.get(panel.name, panel.name.replace("_", " "))
    rows = [(_block(address), row) for address, row in zip(panel.rows, panel.values, strict=True)]
    if panel.form == "heads":
        known = [(block, [value for value in row if value is not None]) for block, row in rows]
        if panel.threshold is not None:
            least = panel.threshold
            return [(f"{name} heads", {b: str(sum(v >= least for v in row)) for b, row in known})]
        head = f"{name} ({panel.unit})" if panel.unit else name
        return [(head, {b: f"{sum(row) / len(row):.3g}" for b, row in known if row})]
    found = []
    for i, column in enumerate(panel.columns):
        head = name if len(panel.columns) == 1 else f"{name} {column}"
        found.append((head, {b: _number(row[i]) for b, row in rows}))
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _block(address: str) -> str:
    words = address.split(".")
    return words[1] if len(words) > 1 else address


def write_diagnosis(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Writes the panels as a picture, heads as maps and the rest as curves, light background.

    Args:
        panels: at least one.
        path: file to write, .png or .svg, overwritten.
        title: first line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines + 0.5)
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold", color=TEXT, parse_math=False)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, place)
        (_draw_heads if panel.form == "heads" else _draw_curves)(axes, panel)
        axes.set_title(panel.title, fontsize=10, color=TEXT, parse_math=False)
        axes.tick_params(labelsize=8, colors=TEXT)
    figure.savefig(path, dpi=110, format=path.suffix[1:])


def _draw_heads(axes: Axes, panel: Panel) -> None:
    import numpy as np

    cells = np.array([[np.nan if v is None else v for v in row] for row in panel.values], dtype=float)
    shares: dict[str, Any] = {} if panel.threshold is None else {"vmin": 0.0, "vmax": 1.0}
    # cividis reads the same with and without colour blindness, and grows lighter evenly.
    image = axes.imshow(cells.T, aspect="auto", cmap="cividis", interpolation="nearest", origin="lower", **shares)
    axes.set_xlabel("block", fontsize=8, color=TEXT)
    axes.set_ylabel("head", fontsize=8, color=TEXT)
    blocks = [_block(address) for address in panel.rows]
    step = max(1, len(blocks) // 6)
    axes.set_xticks(range(0, len(blocks), step), blocks[::step])
    heads = len(panel.columns)
    axes.set_yticks(range(0, heads, max(1, heads // 8)))
    bar = axes.figure.colorbar(image, ax=axes)
    bar.ax.tick_params(labelsize=8, colors=TEXT)
    if panel.unit:
        bar.set_label(panel.unit, fontsize=8, color=TEXT)
    if panel.threshold is not None:
        rows, columns = np.nonzero(np.nan_to_num(cells) >= panel.threshold)
        axes.plot(rows, columns, "o", markersize=4, markerfacecolor="none", markeredgecolor="white")
        axes.set_xlabel(f"block (ring: at least {panel.threshold:g}, {len(rows)} heads)", fontsize=8, color=TEXT)


def _draw_curves(axes: Axes, panel: Panel) -> None:
    blocks = [_block(address) for address in panel.rows]
    for i, column in enumerate(panel.columns):
        values = [float("nan") if (value := row[i]) is None else value for row in panel.values]
        marker = "os"[i % 2]
        axes.plot(range(len(blocks)), values, marker=marker, markersize=3.5, color=LINES[i % 2], label=column)
    known = [v for row in panel.values for v in row if v is not None]
    if known and min(known) > 0 and max(known) > 20 * min(known):
        axes.set_yscale("log")
    step = max(1, len(blocks) // 6)
    axes.set_xticks(range(0, len(blocks), step), blocks[::step])
    axes.set_xlabel("block", fontsize=8, color=TEXT)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(panel.columns) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=TEXT)
