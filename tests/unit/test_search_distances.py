"""Distances against plain formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prunekit.search._distances import DISTANCES, Distance

LENGTHS = [5, 3, 9]
POSITIONS, WIDTH = sum(LENGTHS), 37
FOLLOWING = torch.arange(POSITIONS).remainder(WIDTH).index_fill(0, torch.tensor([4, 7, 16]), -1)


def outputs(seed: int) -> Tensor:
    return 3 * torch.randn(POSITIONS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def js(p: Tensor, q: Tensor) -> Tensor:
    middle = (p + q) / 2
    return (kl(p, middle) + kl(q, middle)).mean() / 2


def js_released(p: Tensor, q: Tensor) -> Tensor:
    middle = (p + q) / 2
    return (kl(middle, p) + kl(middle, q)).mean() / 2


def angular(a: Tensor, b: Tensor) -> Tensor:
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return torch.acos(cosine.clamp(0, 1)).mean()


def norm(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([part.norm() for part in (a - b).split(LENGTHS)]).mean()


def on_probabilities(formula: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: formula(a.softmax(-1), b.softmax(-1))


def loss(a: Tensor, b: Tensor) -> Tensor:
    """Loss of next tokens; where the text has none, both models lose nothing."""
    has, places = FOLLOWING >= 0, torch.arange(POSITIONS)
    lost = a.log_softmax(-1)[places, FOLLOWING] - b.log_softmax(-1)[places, FOLLOWING]
    return torch.where(has, lost, 0.0).mean()


PLAIN = {
    "loss": loss,
    "js": on_probabilities(js),
    "js_released": on_probabilities(js_released),
    "kl": on_probabilities(lambda p, q: kl(p, q).mean()),
    "angular": angular,
    "norm": norm,
}


def measured(distance: Distance, dense: Tensor, cut: Tensor) -> float:
    reference = distance.prepare(dense, FOLLOWING if distance.text else None)
    total, count = distance.total(distance.values(reference, cut.clone()), LENGTHS)
    return float(total) / count


@pytest.mark.parametrize("name", DISTANCES)
def test_distance_equals_the_plain_formula(name: str) -> None:
    dense, cut = outputs(0), outputs(1)
    assert measured(DISTANCES[name], dense, cut) == pytest.approx(float(PLAIN[name](dense, cut)), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DISTANCES)
def test_low_precision_outputs_are_compared_in_float32(name: str, dtype: torch.dtype) -> None:
    dense, cut = outputs(0).to(dtype), outputs(1).to(dtype)
    expected = float(PLAIN[name](dense.double(), cut.double()))
    assert measured(DISTANCES[name], dense, cut) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
def test_pieces_of_positions_add_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    distance, dense, cut = DISTANCES[name], outputs(0), outputs(1)
    whole = measured(distance, dense, cut)
    monkeypatch.setattr("prunekit.search._distances._CACHE_BYTES", 2 * 4 * WIDTH)
    assert measured(distance, dense, cut) == pytest.approx(whole, rel=1e-14)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_model_is_no_distance_from_itself(name: str) -> None:
    dense = outputs(0)
    assert measured(DISTANCES[name], dense, dense) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("name", ["js", "js_released", "kl"])
def test_words_of_no_probability_do_not_make_a_distance_nan(name: str) -> None:
    dense, cut = outputs(0).float(), outputs(1).float()
    dense[:, :4] -= 500.0
    cut[:, 2:6] -= 500.0
    assert math.isfinite(measured(DISTANCES[name], dense, cut))


@pytest.mark.parametrize("name", DISTANCES)
def test_the_even_scale_can_be_gone_back(name: str) -> None:
    distance = DISTANCES[name]
    for value in (0.0, 1e-6, 0.1, 0.5, 0.69):
        assert distance.from_evened(distance.evened(value)) == pytest.approx(value, abs=1e-12)


def test_released_divergence_is_not_the_textbook_one() -> None:
    dense, cut = outputs(0), outputs(1)
    assert measured(DISTANCES["js_released"], dense, cut) > 1.2 * measured(DISTANCES["js"], dense, cut)
