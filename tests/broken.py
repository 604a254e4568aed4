"""Counts damaged checkpoints: how many were tried, and how many of them were refused by one of our errors."""

from __future__ import annotations

from collections import Counter

# `tried` and `refused` in this process. Damage that leaves a sound checkpoint is tried and read.
COUNTS: Counter[str] = Counter()


def count(refused: bool) -> None:
    """Counts one input; what ends otherwise fails its test instead."""
    COUNTS.update(tried=1, refused=int(refused))
