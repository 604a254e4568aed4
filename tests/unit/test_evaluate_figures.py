"""Standard errors, rank correlation and paired intervals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from prunekit.evaluate.figures import Figure, difference, spearman


def test_standard_error_of_a_share() -> None:
    found = Figure.of("mean", [1.0, 0.0, 1.0, 1.0], better="higher")
    assert found.value == 0.75
    assert found.stderr == pytest.approx(math.sqrt(0.25 / 4))
    assert Figure.of("mean", [1.0], better="higher").stderr is None


def test_perplexity_weighs_windows_by_their_tokens() -> None:
    found = Figure.of("exp_mean", [6.0, 1.0], [3.0, 1.0], better="lower")
    assert found.value == pytest.approx(math.exp(7 / 4))


def test_spearman_gives_ties_their_mean_rank() -> None:
    a, b = np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0, 4.0])
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: the covariance 4.5 over sqrt(4.5 * 5).
    assert spearman(a, b) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(a, -b) == pytest.approx(-4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman(a, np.ones(4)))


def test_equal_models_differ_by_nothing() -> None:
    figure = Figure.of("mean", [1.0, 0.0, 1.0, 0.0, 0.0], better="higher")
    found = difference(figure, figure)
    assert (found.value, found.low, found.high, found.clear) == (0.0, 0.0, 0.0, False)


def test_pairing_sees_what_two_standard_errors_hide() -> None:
    draw = np.random.default_rng(0)
    hard = draw.normal(0, 10, 200)
    first = Figure.of("mean", hard.tolist(), better="lower")
    other = Figure.of("mean", (hard + 0.5 + draw.normal(0, 0.5, 200)).tolist(), better="lower")
    found = difference(first, other)
    assert found.clear
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.5 < found.high
    assert first.stderr is not None
    assert found.high - found.low < first.stderr


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw, covered = np.random.default_rng(1), 0
    for _ in range(100):
        a, b = (draw.random((2, 60)) < [[0.6], [0.5]]).astype(float)
        found = difference(
            *(Figure.of("mean", side.tolist(), better="higher") for side in (a, b)), resamples=400, seed=0
        )
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= -0.1 <= found.high
    assert 87 <= covered <= 100


def test_seed_decides_the_interval() -> None:
    draw = np.random.default_rng(2)
    a, b = (Figure.of("mean", draw.normal(size=30).tolist(), better="higher") for _ in range(2))
    assert difference(a, b, seed=3) == difference(a, b, seed=3)
    assert difference(a, b, seed=3) != difference(a, b, seed=4)


def test_figures_without_examples_have_no_interval() -> None:
    found = difference(Figure(2.0, "lower", "ms"), Figure(3.0, "lower", "ms"))
    assert (found.value, found.low, found.clear) == (1.0, None, False)


def test_figures_of_other_examples_have_no_interval() -> None:
    a = Figure.of("mean", [1.0, 0.0], better="higher")
    assert difference(a, Figure.of("mean", [1.0, 0.0, 1.0], better="higher")).low is None


@pytest.mark.parametrize("statistic", ["mean", "exp_mean", "spearman"])
def test_figure_survives_a_file(statistic: str) -> None:
    figure = Figure.of(statistic, [1.0, 2.5, 3.0], [2.0, 1.0, 4.0], better="higher")  # type: ignore[arg-type]
    assert Figure.from_json(json.loads(json.dumps(figure.to_json()))) == figure
