"""One HTML file about a score file: the hardest and easiest examples, the scores, the classes before and after."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.core.page import html_page
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.datasets.rules import Rule
from prunekit.datasets.select import ScoreFile, Selection, select
from prunekit.datasets.source import Source

_TEMPLATES = Path(__file__).parent / "templates"
_TEXT_SHOWN = 400
# Pixels a side that are kept of an image: twice the width of a column, for screens with small pixels.
_SIDE = 240
_BINS = 40
# From this many times the median on, equal bins would put nearly all examples into the first.
_LONG_TAIL = 50
_CLASSES_SHOWN = 30


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
    hardest, easiest = order[:n_shown].tolist(), order[::-1][:n_shown].tolist()
    with progress.task("picking examples", unit="examples") as task:
        shown = _picked(file, {*hardest, *easiest}, chosen, task)
    classes = class_rows(chosen.before, chosen.after)
    page = html_page(
        _TEMPLATES,
        "data pruning report",
        title=f"{Path(file.manifest['data']['path']).name}: {file.metric}",
        lead=f"{len(chosen.indices):,} of {len(order):,} examples stay, the {chosen.rule} ones: {chosen.why}.",
        facts=list(_facts(file)),
        examples=len(order),
        skipped=file.manifest["data"]["skipped"],
        metric=file.metric,
        histogram=histogram(file.scores, chosen.indices),
        classes=classes[:_CLASSES_SHOWN],
        hidden_classes=len(classes[_CLASSES_SHOWN:]),
        images=file.source.kind == "image",
        ends=[
            ("hardest", "Hardest", "The highest scores. Wrong labels and damaged examples gather here.",
             [shown[index] for index in hardest]),
            ("easiest", "Easiest", "The lowest scores.", [shown[index] for index in easiest]),
        ],
    )  # fmt: skip
    return page, chosen


@dataclass(frozen=True)
class Shown:
    """One example as the page shows it.

    Args:
        index: its row.
        score: in four digits.
        label: its class; empty without one.
        kept: whether it stays.
        value: the text, or the image as a data address.
        cut: how long a text is that is not shown to its end.
        small: whether an image has fewer pixels than it is drawn with.
    """

    index: int
    score: str
    label: str
    kept: bool
    value: str
    cut: str = ""
    small: bool = False


def _picked(file: ScoreFile, wanted: set[int], chosen: Selection, task: Any) -> dict[int, Shown]:
    source, found = file.source, {}
    codes, kept = source.codes, wanted.intersection(chosen.indices.tolist())
    for start, values in source.blocks(256):
        for index in wanted.intersection(range(start, start + len(values))):
            label = source.classes[codes[index]] if codes is not None and codes[index] >= 0 else ""
            value = values[index - start]
            look = _image(source, value) if source.kind == "image" else _text(value)
            found[index] = Shown(index, f"{file.scores[index]:.4g}", label, index in kept, **look)
        task.advance(len(values))
    return found


def _text(value: str) -> dict[str, Any]:
    if len(value) <= _TEXT_SHOWN:
        return {"value": value}
    return {"value": value[:_TEXT_SHOWN], "cut": f"{len(value):,} characters in all"}


def _image(source: Source, value: Any) -> dict[str, Any]:
    """The image, decoded and written anew so that nothing but its pixels is in the page."""
    image = source.decoded([value])[0]
    small = max(image.size) < _SIDE
    image.thumbnail((_SIDE, _SIDE))
    held = io.BytesIO()
    # Small ones are drawn pixel by pixel, where a lossy format would show.
    form = "PNG" if small else "JPEG"
    image.save(held, form, quality=85)
    address = f"data:image/{form.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"
    return {"value": address, "small": small}


def _facts(file: ScoreFile) -> Iterator[tuple[str, str]]:
    data, model = file.manifest["data"], file.manifest["model"]
    knobs = ", ".join(f"{name} {value}" for name, value in file.manifest["metrics"][file.metric].items())
    yield "Data", f"{data['path']} ({data['examples']:,} examples, SHA-256 {data['digest'][:16]})"
    yield "Model", f"{model['source']} (SHA-256 {model['digest'][:16]})" if model else "none"
    yield "Metric", file.metric + (f" ({knobs})" if knobs else "")
    yield "Seed", str(file.manifest["settings"]["seed"])
    yield "Versions", ", ".join(f"{name} {number}" for name, number in file.manifest["versions"].items())


@dataclass(frozen=True)
class Bar:
    """One bar: where it begins, of 100 from the top, for all examples and for the kept ones, and what it says."""

    top: float
    kept_top: float
    text: str


@dataclass(frozen=True)
class Histogram:
    """Bars of all scores with the kept ones before them.

    Args:
        bars: in the order of the scores.
        ticks: scores at five places of the axis.
        most: examples in the highest bar.
        log: whether bars are equally wide in the logarithm.
        text: all of it in words.
    """

    bars: tuple[Bar, ...]
    ticks: tuple[str, ...]
    most: str
    log: bool
    text: str


def histogram(scores: np.ndarray, kept: np.ndarray) -> Histogram:
    """The scores in 40 bins, on a logarithmic axis where a few are far above all others.

    Args:
        scores: float32 [n].
        kept: positions that stay.
    """
    low, high = float(scores.min()), float(scores.max())
    log = low > 0 and high > _LONG_TAIL * float(np.median(scores))
    high = high if high > low else low + 1
    edges = (np.geomspace if log else np.linspace)(low, high, _BINS + 1)
    every, stay = np.histogram(scores, edges)[0], np.histogram(scores[kept], edges)[0]
    most = int(every.max())
    bars = tuple(
        Bar(
            round(100 - 100 * n / most, 2),
            round(100 - 100 * held / most, 2),
            f"{edges[place]:.4g} to {edges[place + 1]:.4g}: {n:,} examples, {held:,} kept",
        )
        for place, (n, held) in enumerate(zip(every.tolist(), stay.tolist(), strict=True))
    )
    ticks = tuple(f"{edges[place]:.3g}" for place in range(0, _BINS + 1, _BINS // 4))
    text = f"Histogram of {len(scores):,} scores from {low:.4g} to {high:.4g}, median {np.median(scores):.4g}; "
    text += f"those of the {len(kept):,} kept examples from {scores[kept].min():.4g} to {scores[kept].max():.4g}"
    return Histogram(bars, ticks, f"{most:,}", log, text)


@dataclass(frozen=True)
class ClassRow:
    """A class before and after; widths are percent of the largest share."""

    name: str
    before: str
    before_share: str
    before_width: float
    kept: str
    kept_share: str
    kept_width: float


def class_rows(before: Mapping[str, int], after: Mapping[str, int]) -> list[ClassRow]:
    """Counts and shares of each class; where there are many, those whose share changes most come first."""
    all_, kept = max(1, sum(before.values())), max(1, sum(after.values()))
    shares = {name: (n / all_, after[name] / kept) for name, n in before.items()}
    largest = max((share for pair in shares.values() for share in pair), default=1.0)
    names = list(before)
    if len(names) > _CLASSES_SHOWN:
        names.sort(key=lambda name: -abs(shares[name][1] - shares[name][0]))
    return [
        ClassRow(
            name,
            f"{before[name]:,}", f"{shares[name][0]:.1%}", round(100 * shares[name][0] / largest, 1),
            f"{after[name]:,}", f"{shares[name][1]:.1%}", round(100 * shares[name][1] / largest, 1),
        )
        for name in names
    ]  # fmt: skip
