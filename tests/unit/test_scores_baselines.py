"""Scores that read statistics or nothing, on numbers worked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit.core.errors import UsageError
from prunekit.scores.angular import Angular
from prunekit.scores.block_influence import BlockInfluence
from prunekit.scores.last_k import LastK
from prunekit.scores.random import Random


def group_of(n: int, kind: str = "blocks") -> Any:
    units = tuple(f"blocks.{i}" for i in range(n))
    return SimpleNamespace(kind=kind, address=kind, units=units, members=tuple(() for _ in units))


def no_weights(name: str) -> Tensor:
    raise AssertionError(f"{name} was read")


def test_block_influence_is_one_minus_the_mean_cosine() -> None:
    stats = {f"cosine/blocks.{i}": torch.tensor(value) for i, value in enumerate((0.25, 0.9, -0.5))}
    found = BlockInfluence().score(group_of(3), no_weights, stats)
    assert found.tolist() == pytest.approx([0.75, 0.1, 1.5])


def angles(runs: dict[int, list[float]], n: int) -> Tensor:
    """The boundary matrix [n + 1, n + 1] with these distances on its upper diagonals, 0.9 elsewhere."""
    found = torch.full((n + 1, n + 1), 0.9)
    for span, values in runs.items():
        for i, value in enumerate(values):
            found[i, i + span] = found[i + span, i] = value
    return found.fill_diagonal_(0.0)


def test_angular_gives_every_block_its_best_run() -> None:
    stats = {"angle/blocks": angles({1: [0.4, 0.2, 0.3, 0.1], 2: [0.3, 0.1, 0.2]}, 4)}
    assert Angular(span=2).score(group_of(4), no_weights, stats).tolist() == pytest.approx([0.3, 0.1, 0.1, 0.2])
    assert Angular().score(group_of(4), no_weights, stats).tolist() == pytest.approx([0.4, 0.2, 0.3, 0.1])


def test_angular_lowest_scores_are_the_best_run() -> None:
    n, span = 12, 4
    matrix = torch.rand(n + 1, n + 1, generator=torch.Generator().manual_seed(0))
    start = int(matrix.diagonal(span).argmin())
    found = Angular(span=span).score(group_of(n), no_weights, {"angle/blocks": matrix})
    assert sorted(found.argsort(stable=True)[:span].tolist()) == list(range(start, start + span))


def test_angular_refuses_a_run_longer_than_the_model() -> None:
    with pytest.raises(UsageError, match="longer than the model"):
        Angular(span=5).score(group_of(4), no_weights, {"angle/blocks": torch.zeros(5, 5)})


def test_last_k_scores_fall_with_depth() -> None:
    assert LastK().score(group_of(5), no_weights, {}).tolist() == [4, 3, 2, 1, 0]
    assert LastK(keep_last=1).score(group_of(5), no_weights, {}).tolist() == [4, 3, 2, 1, 5]
    assert LastK(keep_last=9).score(group_of(3), no_weights, {}).tolist() == [5, 4, 3]


def test_random_depends_on_the_seed_and_the_group_only() -> None:
    first, again = (Random(seed=3).score(group_of(50), no_weights, {}) for _ in range(2))
    assert first.equal(again)
    assert not first.equal(Random(seed=4).score(group_of(50), no_weights, {}))
    assert not first.equal(Random(seed=3).score(group_of(50, "sublayers"), no_weights, {}))
