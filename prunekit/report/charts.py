"""Numbers of the report's charts: places on a line chart, classes on a heat map. What draws them is the template."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prunekit.report.run import OrderPart, PlanPart, ScoresPart

# Steps of the colour ramp in page.css.
CLASSES = 9
# A table of units wider than this shows how the scores of a sub-layer are spread instead of every unit.
_MOST_COLUMNS = 64
_QUANTILES = tuple(range(0, 101, 10))
_TICKS = 4


@dataclass(frozen=True)
class Point:
    """One removal on the line chart.

    Args:
        step: 0 is the model before the cut.
        units: what went in this step.
        distance: as text.
        x: place from the left in per cent; None where the distance is no number.
        y: place from the bottom in per cent.
    """

    step: int
    units: tuple[str, ...]
    distance: str
    x: float | None
    y: float | None


@dataclass(frozen=True)
class Tick:
    """A label beside the chart: text and place in per cent."""

    text: str
    at: float


@dataclass(frozen=True)
class LineChart:
    """Distance after each removal.

    Args:
        points: in order, the dense model first.
        path: SVG path in a box of 100 x 100, y downwards; "" without two numbers.
        x_ticks: steps.
        y_ticks: distances.
    """

    points: tuple[Point, ...]
    path: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def line_chart(order: OrderPart) -> LineChart:
    """The line chart of a removal order; it begins at the dense model, whose distance to itself is 0."""
    raw: list[tuple[tuple[str, ...], float | None]] = [((), 0.0), *((s.units, s.distance) for s in order.steps)]
    known = [value for _, value in raw if value is not None and math.isfinite(value)]
    low, high, ticks = nice_range(min(known), max(known))
    last = max(1, len(raw) - 1)
    points = []
    for step, (units, value) in enumerate(raw):
        shown = value is not None and math.isfinite(value)
        y = round(100 * (value - low) / (high - low), 3) if shown and value is not None else None
        points.append(Point(step, units, number(value), round(100 * step / last, 3) if shown else None, y))
    path, pen = [], "M"
    for point in points:
        if point.x is None or point.y is None:
            pen = "M"
            continue
        path.append(f"{pen}{point.x:g} {100 - point.y:g}")
        pen = "L"
    x_step = max(1, math.ceil(last / 8))
    x_ticks = tuple(Tick(str(step), 100 * step / last) for step in range(0, last + 1, x_step))
    y_ticks = tuple(Tick(number(value), round(100 * (value - low) / (high - low), 3)) for value in ticks)
    return LineChart(tuple(points), "".join(path), x_ticks, y_ticks)


def nice_range(low: float, high: float) -> tuple[float, float, tuple[float, ...]]:
    """A range of round numbers that holds 0 and both values, and the ticks in it; (0, 0.37) gives 0 to 0.4 by 0.1."""
    low, high = min(0.0, low), max(0.0, high)
    if high - low <= 0:
        high = low + 1.0
    raw = (high - low) / _TICKS
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next((f * magnitude for f in (1.0, 2.0, 2.5, 5.0) if f * magnitude >= raw * (1 - 1e-9)), 10.0 * magnitude)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, tuple(i * step for i in range(first, last + 1))


def number(value: float | None) -> str:
    """A value with four digits; what is not measured or overflowed says so."""
    if value is None or math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+")


@dataclass(frozen=True)
class HeatCell:
    """One coloured value.

    Args:
        label: what it belongs to.
        text: the value.
        shade: class of the colour ramp, 0 lowest; None where there is no value.
        removed: whether the plan removes it; None where the cell stands for several units.
    """

    label: str
    text: str
    shade: int | None
    removed: bool | None = None


@dataclass(frozen=True)
class HeatMap:
    """Scores of one step.

    Args:
        form: `tiles`: each row is one kind of unit over depth; `table`: each row is a sub-layer.
        columns: heads of the columns of a table, else none.
        rows: head of each row and its cells.
        low: lowest value as text.
        high: highest value as text.
        quantiles: whether cells are quantiles of a sub-layer's scores rather than units.
        gone: whole units that went and their scores, lowest first.
    """

    form: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[HeatCell, ...]], ...]
    low: str
    high: str
    quantiles: bool = False
    gone: tuple[tuple[str, str], ...] = ()


def heat_map(scores: ScoresPart, plan: PlanPart) -> HeatMap:
    """Scores as cells; units inside a sub-layer by row, whole units over depth."""
    finite = [value for value in scores.values if value is not None and math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    if scores.kind in ("blocks", "sublayers", "attention", "cross_attention", "ffn"):
        return _tiles(scores, plan, low, high)
    groups: dict[str, list[tuple[str, float | None]]] = {}
    for unit, value in zip(scores.units, scores.values, strict=True):
        address, _, position = unit.rpartition(".")
        groups.setdefault(address, []).append((position, value))
    widest = max((len(group) for group in groups.values()), default=0)
    if widest > _MOST_COLUMNS:
        return _spread(groups, low, high)
    rows = []
    for address, group in groups.items():
        owner = address.rpartition(".")[0]
        kept = _kept(plan, address, len(group))
        cells = [
            HeatCell(
                f"{address}.{n}", number(v), _shade(v, low, high), owner in plan.drop or (bool(kept) and n not in kept)
            )
            for n, v in group
        ]
        rows.append((owner, tuple(cells)))
    return HeatMap("table", tuple(str(i) for i in range(widest)), tuple(rows), number(low), number(high))


def _kept(plan: PlanPart, address: str, width: int) -> set[str]:
    """Positions that stay; empty where nothing is cut, or where the scores are of a model that was cut before."""
    owner, _, kind = address.rpartition(".")
    kept = plan.keep.get(address)
    if kept is None or plan.widths.get(owner, {}).get(kind) != width:
        return set()
    return {str(position) for position in kept}


def _tiles(scores: ScoresPart, plan: PlanPart, low: float, high: float) -> HeatMap:
    rows: dict[str, list[HeatCell]] = {}
    gone = []
    for unit, value in zip(scores.units, scores.values, strict=True):
        stack, _, words = unit.rpartition("blocks.")
        place, _, kind = words.partition(".")
        parts = ("attention", "ffn", *(["cross_attention"] if stack == "decoder." else []))
        went = unit in plan.drop or {f"{unit}.{part}" for part in parts} <= set(plan.drop)
        cell = HeatCell(place, number(value), _shade(value, low, high), went)
        rows.setdefault(f"{stack.rstrip('.')} {kind or 'block'}".lstrip(), []).append(cell)
        if went:
            gone.append((math.inf if value is None or math.isnan(value) else value, unit, number(value)))
    listed = tuple((unit, text) for _, unit, text in sorted(gone))
    by_kind = tuple((kind, tuple(cells)) for kind, cells in rows.items())
    return HeatMap("tiles", (), by_kind, number(low), number(high), gone=listed)


def _spread(groups: dict[str, list[tuple[str, float | None]]], low: float, high: float) -> HeatMap:
    rows = []
    for address, group in groups.items():
        values = sorted(v for _, v in group if v is not None and math.isfinite(v))
        cells = [
            HeatCell(f"{percent} %", number(v), _shade(v, low, high))
            for percent, v in zip(_QUANTILES, _quantiles(values), strict=False)
        ]
        rows.append((address.rpartition(".")[0], tuple(cells)))
    columns = tuple(f"{percent} %" for percent in _QUANTILES)
    return HeatMap("table", columns, tuple(rows), number(low), number(high), quantiles=True)


def _quantiles(values: Sequence[float]) -> Iterable[float]:
    """The value at each of `_QUANTILES` of ascending values, nearest rank; none without values."""
    return [values[round(p / 100 * (len(values) - 1))] for p in _QUANTILES] if values else []


def _shade(value: float | None, low: float, high: float) -> int | None:
    if value is None or not math.isfinite(value):
        return None
    if high <= low:
        return CLASSES // 2
    return min(CLASSES - 1, int(CLASSES * (value - low) / (high - low)))
