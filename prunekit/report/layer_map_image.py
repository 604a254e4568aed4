"""The layer map as a PNG: a row of cells for each kind of sub-layer, blocks from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.report.layer_map import KINDS, Row, kinds_of, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Kept and narrowed differ in height and lightness too, so the map survives greyscale and colour blindness.
KEPT, NARROWED, OUTLINE, TEXT = "#2f6f9f", "#e0a030", "#a8b0b8", "#333333"
_NAMES = {"attention": "attention", "cross_attention": "cross-att.", "ffn": "FFN"}


def write_layer_map(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """Writes the layer map as a PNG, 150 dots an inch, light background.

    Args:
        rows: from `layer_map.layer_map`.
        path: file to write, overwritten.
        title: first line above the map; the second is the count of what went.
    """
    # A Figure with its own Agg canvas: pyplot would pick a display backend and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Inches: long maps get narrower cells rather than an endless image.
    width, height = min(20.0, max(6.5, 1.2 + 0.28 * len(rows))), 2.2
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    left, right = 0.95, 0.2
    cells_width = min(width - left - right, 0.6 * len(rows))
    axes = figure.add_axes((left / width, 0.62 / height, cells_width / width, 0.86 / height))
    _draw_cells(axes, rows)
    _draw_axes(axes, rows)
    figure.text(
        0.2 / width, 1 - 0.25 / height, title, fontsize=11, fontweight="bold", color=TEXT, va="center", parse_math=False
    )
    figure.text(0.2 / width, 1 - 0.5 / height, summary(rows), fontsize=9, color=TEXT, va="center")
    _draw_legend(axes, rows)
    figure.savefig(path, dpi=150, format="png", metadata={"Software": "prunekit"})


def _draw_cells(axes: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.patches import Rectangle

    for column, row in enumerate(rows):
        for line, kind in enumerate(kinds_of(rows)):
            cell = getattr(row, kind)
            if cell.state == "absent":
                continue
            corner = (column - 0.43, -line - 0.4)
            axes.add_patch(Rectangle(corner, 0.86, 0.8, facecolor="white", edgecolor=OUTLINE, linewidth=0.8))
            if cell.state == "removed":
                axes.plot([column - 0.2, column + 0.2], [-line - 0.2, -line + 0.2], color=OUTLINE, linewidth=1.2)
                axes.plot([column - 0.2, column + 0.2], [-line + 0.2, -line - 0.2], color=OUTLINE, linewidth=1.2)
            else:
                colour = KEPT if cell.state == "kept" else NARROWED
                # The filled height is the share of the width that stays.
                axes.add_patch(Rectangle(corner, 0.86, 0.8 * cell.share, facecolor=colour, edgecolor="none"))


def _draw_axes(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_xlim(-0.6, len(rows) - 0.4)
    kinds = kinds_of(rows)
    axes.set_ylim(-len(kinds) + 0.45, 0.55)
    step = 1 if len(rows) <= 40 else 5 if len(rows) <= 100 else 10
    ticks = [i for i, row in enumerate(rows) if row.block % step == 0]
    # Of two stacks the first letter tells which.
    names = [f"{rows[i].stack[:1]}{rows[i].block}" for i in ticks]
    axes.set_xticks(ticks, names, fontsize=8, color=TEXT)
    axes.set_yticks([-i for i in range(len(kinds))], [_NAMES[kind] for kind in kinds], fontsize=9, color=TEXT)
    beside_ticks: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate("block", (0, 0), (-4, -9), ha="right", va="center", fontsize=9, color=TEXT, **beside_ticks)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_legend(axes: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = axes.get_figure()
    if figure is None:
        return
    seen = {getattr(row, kind).state for row in rows for kind in KINDS}
    removed = Line2D([], [], color=OUTLINE, marker="x", linestyle="none", markersize=6, markeredgewidth=1.4)
    handles = {
        "kept": Patch(facecolor=KEPT, label="kept"),
        "narrowed": Patch(facecolor=NARROWED, label="narrowed (height: share kept)"),
        "removed": removed,
    }
    removed.set_label("removed")
    shown = [handles[state] for state in handles if state in seen]
    figure.legend(
        handles=shown, loc="lower right", ncols=len(shown), fontsize=8, frameon=False, bbox_to_anchor=(1.0, 0.02),
        bbox_transform=figure.transFigure, labelcolor=TEXT,
    )  # fmt: skip
