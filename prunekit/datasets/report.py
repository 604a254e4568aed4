"""One HTML file about a score file: the hardest and easiest examples, the scores, the classes before and after."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.datasets.rules import Rule
from prunekit.datasets.select import ScoreFile, Selection, select
from prunekit.datasets.source import Source

_TEXT_SHOWN = 400
_SIDE = 112
_BINS = 40
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}table{border-collapse:collapse}
td,th{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}td.n,th.n{text-align:right}
.text{white-space:pre-wrap;overflow-wrap:anywhere}.grid{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;width:120px}
figcaption{font-size:12px}img{image-rendering:pixelated}.bar{fill:#4a78b5}.gone{fill:#c9c9c9}
"""


@dataclass(frozen=True)
class Shown:
    """One example as the page shows it."""

    index: int
    score: float
    label: str
    value: Any


def html_report(
    file: ScoreFile, rule: Rule, n_shown: int = 12, progress: Progress = NULL_PROGRESS
) -> tuple[str, Selection]:
    """The page, with nothing loaded from outside, and the selection it shows.

    Args:
        file: the scores.
        rule: whose selection the histogram and the class table show.
        n_shown: examples from each end.
    """
    order = np.argsort(-file.scores, kind="stable")
    chosen = select(file, rule)
    with progress.task("picking examples", unit="examples") as task:
        wanted = {int(index) for index in (*order[:n_shown], *order[-n_shown:])}
        shown = _picked(file, wanted, task)
    facts = file.manifest["data"]
    title = f"{facts['path'].rstrip('/').rpartition('/')[2]}: {file.metric}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _facts(file, chosen),
        "<h2>Scores (higher = harder)</h2>",
        histogram(file.scores, chosen.indices),
        *([f"<h2>Classes</h2>{_classes(chosen)}"] if chosen.before else []),
        f"<h2>Hardest</h2>{_examples([shown[i] for i in order[:n_shown].tolist()], file.source)}",
        f"<h2>Easiest</h2>{_examples([shown[i] for i in order[::-1][:n_shown].tolist()], file.source)}",
    ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return head + "\n".join(parts) + "</html>\n", chosen


def _picked(file: ScoreFile, wanted: set[int], task: Any) -> dict[int, Shown]:
    source, found = file.source, {}
    codes = source.codes
    for start, values in source.blocks(256):
        for index in wanted.intersection(range(start, start + len(values))):
            label = source.classes[codes[index]] if codes is not None and codes[index] >= 0 else ""
            found[index] = Shown(index, float(file.scores[index]), label, values[index - start])
        task.advance(len(values))
    return found


def _facts(file: ScoreFile, chosen: Selection) -> str:
    data, model = file.manifest["data"], file.manifest["model"]
    rows = {
        "data": f"{data['path']} ({data['examples']:,} examples, SHA-256 {data['digest'][:16]})",
        "model": f"{model['source']} (SHA-256 {model['digest'][:16]})" if model else "none",
        "metric": f"{file.metric} {file.manifest['metrics'][file.metric] or ''}",
        "seed": str(file.manifest["settings"]["seed"]),
        "kept": f"{len(chosen.indices):,}, the {chosen.rule} ones: {chosen.why}",
    }
    return _table([(escape(name), escape(text)) for name, text in rows.items()])


def _table(rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = (), numbers: int = 0) -> str:
    """Cells must be escaped already; the last `numbers` columns align right."""

    def line(cells: tuple[str, ...], tag: str) -> str:
        first = len(cells) - numbers
        return "".join(
            f"<{tag}{' class=n' if place >= first else ''}>{cell}</{tag}>" for place, cell in enumerate(cells)
        )

    lines = ([f"<tr>{line(head, 'th')}</tr>"] if head else []) + [f"<tr>{line(cells, 'td')}</tr>" for cells in rows]
    return f"<table>{''.join(lines)}</table>"


def histogram(scores: np.ndarray, kept: np.ndarray) -> str:
    """SVG bars of all scores in grey and of the kept ones in blue before them."""
    low, high = float(scores.min()), float(scores.max())
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    every, stay = np.histogram(scores, edges)[0], np.histogram(scores[kept], edges)[0]
    top, wide = max(1, int(every.max())), 800 / _BINS
    bars = [
        f'<rect class="{name}" x="{place * wide:.1f}" y="{150 - 150 * n / top:.1f}" width="{wide - 1:.1f}" '
        f'height="{150 * n / top:.1f}"><title>{n:,}</title></rect>'
        for name, counts in (("gone", every), ("bar", stay))
        for place, n in enumerate(counts.tolist())
    ]
    ends = (
        f'<text x="0" y="168" font-size="12">{low:.4g}</text>'
        f'<text x="800" y="168" font-size="12" text-anchor="end">{high:.4g}</text>'
    )
    caption = f"<p>Blue: kept; grey: not kept. The highest bar has {top:,} examples.</p>"
    return f'<svg viewBox="0 0 800 175" width="800" role="img">{"".join(bars)}{ends}</svg>{caption}'


def _classes(chosen: Selection) -> str:
    return _table(class_rows(chosen.before, chosen.after), ("class", "before", "share", "kept", "share"), numbers=4)


def class_rows(before: Mapping[str, int], after: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Name, count, share, kept, share of kept for each class, escaped."""
    all_, kept = max(1, sum(before.values())), max(1, sum(after.values()))
    return [
        (escape(name), f"{n:,}", f"{n / all_:.1%}", f"{after[name]:,}", f"{after[name] / kept:.1%}")
        for name, n in before.items()
    ]


def _examples(shown: Sequence[Shown], source: Source) -> str:
    if source.kind == "text":
        rows = [
            (
                f"{one.index}",
                escape(one.label),
                f'<div class="text">{escape(_short(one.value))}</div>',
                f"{one.score:.4g}",
            )
            for one in shown
        ]
        return _table(rows, ("row", "class", "text", "score"), numbers=1)
    figures = [
        f'<figure><img src="{_inlined(source, one.value)}" alt="row {one.index}" width="{_SIDE}">'
        f"<figcaption>{escape(one.label)} {one.score:.4g}</figcaption></figure>"
        for one in shown
    ]
    return f'<div class="grid">{"".join(figures)}</div>'


def _short(text: str) -> str:
    return text if len(text) <= _TEXT_SHOWN else text[:_TEXT_SHOWN] + " ..."


def _inlined(source: Source, value: Any) -> str:
    """The image, decoded and written anew as PNG of at most 112 pixels a side, as a data address."""
    image = source.decoded([value])[0]
    image.thumbnail((_SIDE, _SIDE))
    held = io.BytesIO()
    image.save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
