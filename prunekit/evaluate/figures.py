"""Figures that a task measures, with their standard errors, and paired differences between two models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Statistic = Literal["", "mean", "exp_mean", "spearman"]
RESAMPLES = 2000
# Resampled values held at a time.
_HELD = 4_000_000


@dataclass(frozen=True)
class Figure:
    """One number that a task found.

    Args:
        value: the number.
        better: whether more of it is good.
        unit: as printed; empty for shares and other plain numbers.
        statistic: how the value follows from its examples: `mean` of one column; `exp_mean`, exp(sum of the first over
            sum of the second); `spearman`, rank correlation of two columns; empty where there are none.
        examples: columns of per-example values, all of one length.
        stderr: standard error of the value over examples; None without examples, or with a single one.
    """

    value: float
    better: Literal["higher", "lower"]
    unit: str = ""
    statistic: Statistic = ""
    examples: tuple[tuple[float, ...], ...] = ()
    stderr: float | None = None

    @classmethod
    def of(cls, statistic: Statistic, *columns: Sequence[float], better: Literal["higher", "lower"]) -> Figure:
        """The figure that examples give, with its standard error."""
        table = _table(columns)
        value = float(_statistic(statistic, table, np.arange(table.shape[1])[None])[0])
        kept = tuple(tuple(float(entry) for entry in column) for column in columns)
        return cls(value, better, "", statistic, kept, _standard_error(statistic, table))

    def to_json(self) -> dict[str, Any]:
        """Plain values, per-example values included."""
        return {
            "value": self.value,
            "stderr": self.stderr,
            "better": self.better,
            "unit": self.unit,
            "n": len(self.examples[0]) if self.examples else None,
            "statistic": self.statistic,
            "examples": [list(column) for column in self.examples],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Figure:
        """The figure that `to_json` wrote."""
        columns = tuple(tuple(float(x) for x in column) for column in data["examples"])
        value = math.inf if data["value"] is None else float(data["value"])
        return cls(value, data["better"], data["unit"], data["statistic"], columns, data["stderr"])


@dataclass(frozen=True)
class Difference:
    """How much a figure of one model differs from another's.

    Args:
        value: other less first.
        low: lower end of the 95 % interval; None without per-example values.
        high: its upper end.
        resamples: bootstrap resamples behind the interval.
    """

    value: float
    low: float | None = None
    high: float | None = None
    resamples: int = 0

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def difference(first: Figure, other: Figure, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Paired percentile bootstrap: both models are judged on the same resampled examples, 2.5 to 97.5 %.

    Args:
        first: figure of the model that is compared with.
        other: the same figure of the other model on the same examples.
        resamples: how often examples are drawn with replacement, at least 1.
        seed: of the draws.
    """
    value = other.value - first.value
    shapes = [[len(column) for column in figure.examples] for figure in (first, other)]
    if not first.examples or first.statistic != other.statistic or shapes[0] != shapes[1]:
        return Difference(value)
    tables = [_table(figure.examples) for figure in (first, other)]
    with np.errstate(invalid="ignore"):
        found = np.concatenate(
            [
                _statistic(first.statistic, tables[1], index) - _statistic(first.statistic, tables[0], index)
                for index in _draws(tables[0].shape[1], resamples, seed)
            ]
        )
    found = found[np.isfinite(found)]
    if not len(found):
        return Difference(value)
    low, high = np.percentile(found, [2.5, 97.5])
    return Difference(value, float(low), float(high), resamples)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; NaN where one side is constant.

    Args:
        a: float [n].
        b: float [n].
    """
    x, y = (_ranks(side) - (len(side) + 1) / 2 for side in (a, b))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values at the mean of theirs: 3, 1, 3 give 2.5, 1, 2.5."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    return np.asarray((ends - (count - 1) / 2)[place])


def _table(columns: Sequence[Sequence[float]]) -> np.ndarray:
    return np.asarray(columns, dtype=np.float64)


def _statistic(name: Statistic, table: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Value of each resample; `index` [resamples, n] says which examples it holds."""
    if name == "mean":
        return np.asarray(table[0][index].mean(axis=1))
    if name == "exp_mean":
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(table[0][index].sum(axis=1) / table[1][index].sum(axis=1)))
    return np.array([spearman(table[0][row], table[1][row]) for row in index])


def _draws(n: int, resamples: int, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    size = max(1, _HELD // n)
    return [
        generator.integers(0, n, (min(size, resamples - first), n), dtype=np.int32)
        for first in range(0, resamples, size)
    ]


def _standard_error(name: Statistic, table: np.ndarray) -> float | None:
    """Of a mean: standard deviation over the root of n; of the others by the bootstrap."""
    n = table.shape[1]
    if n < 2:
        return None
    if name == "mean":
        return float(table[0].std(ddof=1) / math.sqrt(n))
    with np.errstate(invalid="ignore"):
        found = np.concatenate([_statistic(name, table, index) for index in _draws(n, 500, 0)])
        error = float(np.nanstd(found, ddof=1)) if len(found) else math.nan
    return error if math.isfinite(error) else None
