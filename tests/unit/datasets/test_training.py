"""The shared loop: what it records, and what it does not do twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from prunekit.core.ranks import Ranks
from prunekit.datasets import training
from prunekit.datasets.training import Head, Learner, Run, Tally, gradient_norms, train_one, trained

N, D = 40, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int32)


def head(width: int = 0) -> Head:
    return Head(torch.zeros(D), torch.ones(D), 2, width)


def learner(labels: np.ndarray = Y) -> Learner:
    return Learner(head, {"x": X}, labels, 2)


def test_forgetting_counts_flips_from_right_to_wrong() -> None:
    tally = Tally(3)
    for turns in ([1, 0, 0], [0, 0, 1], [1, 0, 1], [0, 0, 1]):
        tally.seen(np.arange(3), np.array(turns, bool))
    assert tally.forgotten.tolist() == [2, 0, 0]
    assert tally.learned.tolist() == [True, False, True]


def test_error_of_an_untrained_model_is_the_closed_form(tmp_path: Path) -> None:
    def fixed(width: int) -> nn.Module:
        model = head()
        with torch.no_grad():
            model.layers[-1].weight.zero_()
            model.layers[-1].bias.copy_(torch.tensor([0.7, 0.3]).log())
        return model

    made = train_one(Learner(fixed, {"x": X}, Y, 2), Run(epochs=0), 0, tmp_path)
    # Class 0: (0.7 - 1, 0.3), class 1: (0.7, 0.3 - 1).
    expected = np.where(Y == 0, np.sqrt(2) * 0.3, np.sqrt(2) * 0.7)
    assert np.allclose(made.error, expected, atol=1e-6)
    assert np.allclose(made.loss, np.where(Y == 0, -np.log(0.7), -np.log(0.3)), atol=1e-6)
    assert np.array_equal(made.correct, Y == 0)


def test_gradient_norm_of_a_linear_head_is_the_closed_form() -> None:
    torch.manual_seed(0)
    model, x, y = head(), torch.tensor(X), torch.tensor(Y).long()
    error = model(x).softmax(-1) - nn.functional.one_hot(y, 2)
    expected = error.norm(dim=1) * (x.square().sum(1) + 1).sqrt()
    assert np.allclose(gradient_norms(model, {"x": x}, y), expected.detach().numpy(), atol=1e-5)


def test_gradient_norm_of_any_model_equals_that_of_a_head() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: Head) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    torch.manual_seed(0)
    model, x, y = head(5), torch.tensor(X), torch.tensor(Y).long()
    assert np.allclose(
        gradient_norms(Wrapped(model), {"x": x}, y), gradient_norms(model, {"x": x}, y), rtol=1e-4, atol=1e-6
    )


def test_training_learns_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    run = Run(epochs=8, batch=8, lr=0.05)
    a = train_one(learner(), run, 3, tmp_path)
    torch.manual_seed(99)
    b = train_one(learner(), run, 3, tmp_path)
    c = train_one(learner(), run, 4, tmp_path)
    assert a.correct.mean() > 0.9
    assert np.array_equal(a.error, b.error)
    assert not np.array_equal(a.error, c.error)


def test_training_leaves_the_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train_one(learner(), Run(epochs=1), 0, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_subset_models_train_on_their_share_only(tmp_path: Path) -> None:
    made = train_one(learner(), Run(epochs=2, subset=0.7), 0, tmp_path)
    assert made.members.sum() == 28
    assert not made.learned[~made.members].any()


def test_finished_seeds_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seeds = Run(epochs=1), []
    real = train_one

    def counted(learner: Learner, run: Run, seed: int, folder: Path) -> training.Outcome:
        seeds.append(seed)
        if seed == 2 and len(seeds) == 3:
            raise KeyboardInterrupt
        return real(learner, run, seed, folder)

    monkeypatch.setattr(training, "train_one", counted)
    with pytest.raises(KeyboardInterrupt):
        trained(learner(), run, 4, 0, tmp_path, Ranks())
    found = trained(learner(), run, 4, 0, tmp_path, Ranks())
    assert seeds == [0, 1, 2, 2, 3]
    assert len(found) == 4


def test_ranks_train_every_nth_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Second(Ranks):
        def wait(self) -> None:
            pass

    trained(learner(), Run(epochs=0), 4, 0, tmp_path, Ranks())
    for file in tmp_path.rglob("seed-[13].npz"):
        file.unlink()
    seeds = []
    real = train_one

    def counted(learner: Learner, run: Run, seed: int, folder: Path) -> training.Outcome:
        seeds.append(seed)
        return real(learner, run, seed, folder)

    monkeypatch.setattr(training, "train_one", counted)
    trained(learner(), Run(epochs=0), 4, 0, tmp_path, Second(1, 2))
    assert seeds == [1, 3]
