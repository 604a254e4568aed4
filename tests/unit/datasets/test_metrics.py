"""Metrics against values by hand, brute force and planted errors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow")

from prunekit.core.errors import EvaluationError, UsageError
from prunekit.core.registry import METRICS
from prunekit.datasets.metrics._subsets import held_out_errors, influence, memorization
from prunekit.datasets.score import made
from prunekit.datasets.training import Outcome

RNG = np.random.default_rng(0)
LABELS = np.arange(30) % 2
VECTORS = RNG.normal(size=(30, 4)) + 3 * LABELS[:, None] * np.array([1, 0, 0, 0])


def outcome(**parts: Any) -> Outcome:
    empty = np.zeros(0)
    names = ("members", "correct", "error", "loss", "forgotten", "learned", "gradient")
    return Outcome(**{name: np.asarray(parts.get(name, empty)) for name in names})


class Told:
    """Examples whose models were trained elsewhere."""

    labelled = True

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes = outcomes

    def train(self, run: Any, models: int) -> tuple[Outcome, ...]:
        return self.outcomes


def test_every_metric_scores_every_example(examples: Callable[..., Any]) -> None:
    pytest.importorskip("sklearn")
    data = examples(VECTORS, LABELS)
    for name in METRICS.names():
        found = METRICS.get(name)(**METRICS.get(name).example).score(data)
        assert found.shape == (30,), name
        assert np.isfinite(found).all(), name


def test_el2n_is_the_mean_over_models() -> None:
    data = Told(outcome(error=np.array([0.2, 1.0])), outcome(error=np.array([0.4, 0.0])))
    assert made("el2n", {"models": 2}).score(data) == pytest.approx([0.3, 0.5])


def test_forgetting_puts_never_learned_examples_on_top() -> None:
    data = Told(outcome(forgotten=np.array([2, 0, 0]), learned=np.array([True, False, True])))
    assert made("forgetting", {"models": 1, "epochs": 9}).score(data).tolist() == [2, 9, 0]


def nearest_neighbour_runs() -> tuple[np.ndarray, np.ndarray]:
    """Every subset of 4 of 7 points on a line, and what a nearest-neighbour classifier trained on it gets right."""
    x, y = np.array([0.0, 1.0, 2.1, 3.3, 10.0, 11.2, 12.5]), np.array([0, 0, 1, 0, 1, 1, 0])
    members, correct = [], []
    for chosen in combinations(range(7), 4):
        distance = np.abs(x[:, None] - x[list(chosen)])
        correct.append(y[list(chosen)][distance.argmin(1)] == y)
        members.append(np.isin(np.arange(7), chosen))
    return np.array(members), np.array(correct)


def brute_influence(members: np.ndarray, correct: np.ndarray, i: int, j: int) -> float:
    """Leave-one-out by definition: models without j, with i against without i."""
    with_i = [right[j] for member, right in zip(members, correct, strict=True) if not member[j] and member[i]]
    without = [right[j] for member, right in zip(members, correct, strict=True) if not member[j] and not member[i]]
    return abs(sum(with_i) / len(with_i) - sum(without) / len(without)) if with_i and without else 0.0


def test_memorization_equals_leaving_out_by_brute_force() -> None:
    members, correct = nearest_neighbour_runs()
    expected = []
    for i in range(7):
        inside = [right[i] for member, right in zip(members, correct, strict=True) if member[i]]
        outside = [right[i] for member, right in zip(members, correct, strict=True) if not member[i]]
        expected.append(sum(inside) / len(inside) - sum(outside) / len(outside))
    assert memorization(members, correct) == pytest.approx(expected)
    # The odd one among neighbours of the other class is right only where it was trained on.
    assert max(expected) == expected[2] == 1.0


def test_influence_equals_leaving_out_by_brute_force() -> None:
    members, correct = nearest_neighbour_runs()
    pairs = [[brute_influence(members, correct, i, j) for j in range(7)] for i in range(7)]
    assert influence(members, correct, "max") == pytest.approx([max(row) for row in pairs], abs=1e-6)
    assert influence(members, correct, "sum") == pytest.approx([sum(row) for row in pairs], abs=1e-5)


def test_ddd_asks_only_models_that_did_not_train_on_the_example() -> None:
    members = np.array([[True, False], [False, False], [False, True]])
    correct = np.array([[True, False], [False, True], [True, True]])
    assert held_out_errors(members, correct).tolist() == [0.5, 0.5]


def test_ensemble_active_is_the_mutual_information(tmp_path) -> None:
    files = []
    for number, rows in enumerate(([[1, 0], [0.5, 0.5]], [[0, 1], [0.5, 0.5]])):
        files.append(tmp_path / f"{number}.npy")
        np.save(files[-1], np.array(rows, np.float16))

    class Data:
        n = 2

        def train(self, run: Any, models: int) -> list[Any]:
            return [type("O", (), {"probabilities": file}) for file in files]

    assert made("ensemble_active", {"models": 2}).score(Data()) == pytest.approx([np.log(2), 0], abs=1e-5)


def test_supervised_prototypes_by_hand(examples: Callable[..., Any]) -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0, 3], [0, 1]])
    found = made("supervised_prototypes", {}).score(examples(vectors, np.array([0, 0, 0, 1, 1])))
    mean = np.array([2, 1]) / np.sqrt(5)
    assert found == pytest.approx([1 - mean[0], 1 - mean[0], 1 - mean[1], 0, 0], abs=1e-6)


def test_ssl_prototypes_give_the_outlier_the_highest_score(examples: Callable[..., Any]) -> None:
    pytest.importorskip("sklearn")
    vectors = np.concatenate([np.eye(4)[[0] * 10], np.eye(4)[[1] * 10], [[0.2, 0.1, 0.9, 0]]]) + 0.01 * RNG.normal(
        size=(21, 4)
    )
    found = made("ssl_prototypes", {"clusters": 2, "engine": "scikit-learn"}).score(examples(vectors))
    assert found.argmax() == 20
    assert found[:20].max() < 0.1


@pytest.mark.slow
def test_memorization_finds_wrong_labels(examples: Callable[..., Any]) -> None:
    labels = LABELS.copy()
    wrong = [3, 8]
    labels[wrong] = 1 - labels[wrong]
    signal = 2.0 * LABELS[:, None] + RNG.normal(size=(30, 40))
    data = examples(np.concatenate([signal, RNG.normal(size=(30, 60))], axis=1), labels)
    found = made("memorization", {"models": 24, "epochs": 40}).score(data)
    assert set(np.argsort(-found)[:2]) == set(wrong)


def test_loss_without_labels_is_that_of_the_language_model(examples: Callable[..., Any]) -> None:
    assert made("loss", {}).score(examples(VECTORS)).tolist() == list(range(30))


def test_el2n_without_labels_is_the_error_of_the_language_model(examples: Callable[..., Any]) -> None:
    data = examples(VECTORS)
    data.encoder.causal = True
    assert made("el2n", {}).score(data).tolist() == [0.5] * 30


@pytest.mark.parametrize("name", ["el2n", *(name for name in METRICS.names() if "labels" in METRICS.get(name).needs)])
def test_missing_labels_are_an_error(name: str, examples: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="no labels"):
        METRICS.get(name)().score(examples(VECTORS))


def test_bad_labels_and_too_few_examples_are_found_before_anything_is_embedded(examples: Callable[..., Any]) -> None:
    data, single = examples(VECTORS), examples(VECTORS, np.zeros(30, int))
    for one in (data, single):
        one.encoder.vectors = None
        with pytest.raises(UsageError, match=r"no labels|single class"):
            made("memorization", {}).score(one)
    with pytest.raises(UsageError, match="30 examples cannot make 31 clusters"):
        made("ssl_prototypes", {"clusters": 31}).score(data)


def test_a_single_class_is_an_error(examples: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="single class"):
        made("el2n", {}).score(examples(VECTORS, np.zeros(30, int)))


def test_labels_that_are_all_different_are_an_error(examples: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="holds no classes") as raised:
        made("el2n", {}).score(examples(VECTORS, np.arange(30)))
    assert raised.value.why == "column `label` has another value in every row"


def test_fewer_examples_than_clusters_are_an_error(examples: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="30 examples cannot make 31 clusters"):
        made("ssl_prototypes", {"clusters": 31}).score(examples(VECTORS))


def test_embeddings_that_are_not_finite_are_an_error(examples: Callable[..., Any]) -> None:
    vectors = VECTORS.copy()
    vectors[7, 1] = np.nan
    with pytest.raises(EvaluationError, match="example 7 is not finite"):
        made("ssl_prototypes", {}).score(examples(vectors))


def test_unknown_knob_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown key `modles`") as raised:
        made("el2n", {"modles": 3})
    assert "models" in raised.value.hint
