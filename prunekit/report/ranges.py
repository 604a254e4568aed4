"""Block numbers folded into ranges."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")


def numbers(values: Sequence[int]) -> str:
    """Ascending numbers with runs folded: [1, 2, 3, 7, 9, 10] gives `1-3, 7, 9-10`."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def fold(items: Sequence[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Neighbours with equal keys as one list each, in order."""
    runs: list[list[T]] = []
    for item in items:
        if runs and key(runs[-1][-1]) == key(item):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs
