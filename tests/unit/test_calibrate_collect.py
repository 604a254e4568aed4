"""Observers against plain formulas, on a stack of random maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit.calibrate.collect import OBSERVERS, _feed, collect
from prunekit.core.errors import UsageError


class Maps:
    """Stands in for a model: an embedding table and one matrix a sub-layer, added to the residual stream."""

    offloaded = False
    addresses = ("blocks.0.attention", "blocks.0.ffn", "blocks.1.ffn", "blocks.2.attention", "blocks.2.ffn")

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(50, 16, generator=generator)
        self.maps = torch.randn(5, 16, 16, generator=generator) * 0.2
        self.seen: Callable[[str, Tensor, Tensor], None] | None = None

    def enter(self, batch: dict[str, Tensor]) -> Any:
        return SimpleNamespace(hidden=self.table[batch["input_ids"]])

    def run(self, i: int, hidden: Tensor, state: Any) -> Tensor:
        leaving = hidden @ self.maps[i]
        if self.seen is not None:
            self.seen(self.addresses[i], hidden, leaving)
        return hidden + leaving

    @contextmanager
    def projections(self, seen: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
        self.seen = seen
        yield
        self.seen = None

    def boundaries(self, ids: Tensor) -> list[Tensor]:
        found = [self.table[ids]]
        for i in range(5):
            found.append(self.run(i, found[-1], None))
        return found


IDS = torch.randint(0, 50, (6, 9), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(9) < torch.tensor([9, 5, 1, 9, 7, 3])[:, None]).long()
PADDED = {"input_ids": IDS, "attention_mask": MASK}
STACK: Any = Maps()
BLOCKS = {"blocks.0": (0, 2), "blocks.1": (2, 3), "blocks.2": (3, 5)}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def test_cosine_equals_the_plain_mean_over_tokens() -> None:
    found = collect(STACK, PADDED, ("cosine",))
    h = STACK.boundaries(IDS)
    spans = {**BLOCKS, **{address: (i, i + 1) for i, address in enumerate(STACK.addresses)}}
    assert set(found) == {f"cosine/{address}" for address in spans}
    for address, (a, b) in spans.items():
        expected = cosine(h[a], h[b])[MASK.bool()].mean()
        assert float(found[f"cosine/{address}"]) == pytest.approx(float(expected), abs=1e-6)


def test_projection_equals_the_plain_moments_over_tokens() -> None:
    found = collect(STACK, PADDED, ("projection",))
    h = STACK.boundaries(IDS)
    for i, address in enumerate(STACK.addresses):
        rows = h[i][MASK.bool()].double()
        torch.testing.assert_close(found[f"projection/mean/{address}"].double(), rows.mean(0), rtol=1e-6, atol=1e-6)
        square = found[f"projection/square/{address}"].double()
        torch.testing.assert_close(square, rows.square().mean(0), rtol=1e-6, atol=1e-6)


def test_angle_equals_the_plain_mean_at_the_last_token() -> None:
    found = collect(STACK, PADDED, ("angle",))["angle/blocks"]
    rows, last = torch.arange(6), MASK.sum(1) - 1
    h = [STACK.boundaries(IDS)[i][rows, last].double() for i in (0, 2, 3, 5)]
    for i in range(4):
        for j in range(4):
            expected = torch.acos(cosine(h[i], h[j]).clamp(-1, 1)).mean() / math.pi if i != j else 0.0
            assert float(found[i, j]) == pytest.approx(float(expected), abs=1e-5)


def test_last_token_is_found_with_padding_on_the_left() -> None:
    left = {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1)}
    found = collect(STACK, left, ("angle",))["angle/blocks"]
    plain = collect(STACK, IDS[:, :1], ("angle",))["angle/blocks"]
    assert torch.allclose(found, plain, atol=1e-6)


@pytest.mark.parametrize("name", OBSERVERS.names())
def test_merging_two_halves_equals_one_pass(name: str) -> None:
    whole = collect(STACK, IDS, (name,))
    halves = [OBSERVERS.get(name)() for _ in range(2)]
    for observer, part in zip(halves, (IDS[:2], IDS[2:]), strict=True):
        _feed(STACK, {"input_ids": part}, [observer])
    merged = OBSERVERS.get(name)()
    for observer in (*halves, OBSERVERS.get(name)()):
        merged.merge(observer.sums())
    assert merged.value().keys() == whole.keys()
    assert whole
    for key, value in merged.value().items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, whole[key], atol=1e-6)


def test_one_pass_feeds_all_observers_and_repeats_count_once() -> None:
    runs = 0

    class Counting(Maps):
        def enter(self, batch: dict[str, Tensor]) -> Any:
            nonlocal runs
            runs += 1
            return super().enter(batch)

    stack: Any = Counting()
    found = collect(stack, IDS, ("cosine", "angle", "cosine"))
    assert runs == 6
    assert {key.partition("/")[0] for key in found} == {"cosine", "angle"}


def test_no_needs_runs_nothing() -> None:
    assert collect(None, IDS, ()) == {}  # type: ignore[arg-type]


def test_unknown_statistic_is_refused() -> None:
    with pytest.raises(UsageError, match="cosin"):
        collect(STACK, IDS, ("cosin",))
