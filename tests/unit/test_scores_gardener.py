"""Gardener against a plain count, by hand, and over the number formats."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunekit.core.errors import CheckpointError
from prunekit.scores import _counts
from prunekit.scores.gardener import Gardener


def group_of(*members: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """A group of blocks with these tensors, and all tensors by name."""
    tensors = {f"{i}.{name}": value for i, unit in enumerate(members) for name, value in unit.items()}
    refs = tuple(
        tuple(SimpleNamespace(name=f"{i}.{name}", shape=tuple(value.shape), layout=()) for name, value in unit.items())
        for i, unit in enumerate(members)
    )
    units = tuple(f"blocks.{i}" for i in range(len(members)))
    return SimpleNamespace(kind="blocks", address="blocks", units=units, members=refs), tensors


def reference(tensors: list[Tensor], dtype: type) -> float:
    """Entropy by sorting everything: numpy's unique on the pooled, rounded values."""
    values = np.concatenate([t.to(torch.float32).numpy().astype(dtype).ravel() for t in tensors])
    counts = np.unique(values, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def test_entropy_of_four_weights_equals_the_hand_worked_value() -> None:
    group, tensors = group_of({"w": torch.tensor([[0.5, 0.5], [-1.0, 2.0]])})
    expected = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert Gardener().score(group, tensors.__getitem__, {}).tolist() == [pytest.approx(expected, rel=1e-6)]
    assert expected == pytest.approx(1.0397, abs=5e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("precision", "dtype"), [("float16", np.float16), ("float32", np.float32)])
def test_score_equals_numpy_unique_for_every_stored_type(stored: torch.dtype, precision: Any, dtype: type) -> None:
    generator = torch.Generator().manual_seed(0)
    # Subnormal, overflowing and zero values of float16 are among them.
    unit = {
        "a": (torch.randn(300, 50, generator=generator) * 0.02).to(stored),
        "b": (torch.randn(40, 70, generator=generator) * 1e-6).to(stored),
        "c": (torch.randn(8, 8, generator=generator) * 1e6).to(stored),
    }
    group, tensors = group_of(unit)
    found = Gardener(precision=precision).score(group, tensors.__getitem__, {})
    with np.errstate(over="ignore"):
        assert float(found) == pytest.approx(reference(list(unit.values()), dtype), rel=1e-6)


def test_rounding_to_bfloat16_counts_fewer_values_than_float16() -> None:
    group, tensors = group_of({"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(1))})
    coarse, fine = (Gardener(precision=p).score(group, tensors.__getitem__, {}) for p in ("bfloat16", "float16"))
    values = tensors["0.w"].to(torch.bfloat16)
    counts = torch.unique(values.float(), return_counts=True)[1]
    assert float(coarse) == pytest.approx(_counts.entropy(counts), rel=1e-6)
    assert float(coarse) < float(fine)


def test_both_zeros_count_as_one_value() -> None:
    group, tensors = group_of({"w": torch.tensor([[0.0, -0.0], [1.0, 1.0]])})
    for precision in ("float16", "bfloat16", "float32"):
        found = Gardener(precision=precision).score(group, tensors.__getitem__, {})  # type: ignore[arg-type]
        assert float(found) == pytest.approx(math.log(2), rel=1e-6)


def test_only_matrices_count_and_tensors_are_pooled() -> None:
    matrix = torch.tensor([[1.0, 2.0]])
    group, tensors = group_of({"q": matrix, "k": matrix, "norm": torch.arange(7.0), "bias": torch.arange(9.0)})
    assert float(Gardener().score(group, tensors.__getitem__, {})) == pytest.approx(math.log(2), rel=1e-6)


def test_float32_counts_in_small_ranges_equal_one_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(120, 90, generator=torch.Generator().manual_seed(2)).repeat(2, 1)
    values[0, :4] = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    whole = _counts.value_counts([lambda: values], torch.float32)
    monkeypatch.setattr(_counts, "_SORTED_AT_ONCE", 500)
    parts = _counts.value_counts([lambda: values[:100], lambda: values[100:]], torch.float32)
    assert sorted(parts.tolist()) == sorted(whole.tolist())
    assert int(parts.sum()) == values.numel()


def test_weights_with_rows_are_read_in_pieces_and_score_the_same() -> None:
    tensor = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    group, tensors = group_of({"w": tensor})
    read: list[tuple[int, int]] = []

    class Rows:
        def __call__(self, name: str) -> Tensor:
            raise AssertionError("the whole tensor was read")

        def rows(self, name: str, first: int, end: int) -> Tensor:
            read.append((first, end))
            return tensors[name][first:end]

    in_pieces = Gardener().score(group, Rows(), {})
    assert in_pieces.equal(Gardener().score(group, tensors.__getitem__, {}))
    assert len(read) > 1
    assert (min(read)[0], max(read)[1]) == (0, 4096)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_weights_that_are_not_numbers_are_refused(precision: Any) -> None:
    group, tensors = group_of({"w": torch.tensor([[1.0, float("nan")]])})
    with pytest.raises(CheckpointError, match="not numbers"):
        Gardener(precision=precision).score(group, tensors.__getitem__, {})


def test_torch_keeps_its_number_of_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _counts.value_counts([lambda: torch.ones(3, 3)], torch.float16)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
