"""Losses of healing against plain second derivations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prunekit.heal._losses import Top, hidden_error, kl, kl_of_top, next_token, top
from prunekit.heal.scene import matches


def logits(seed: int, vocabulary: int = 7) -> Tensor:
    return 3 * torch.randn(2, 5, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_the_sum_over_the_vocabulary(temperature: float) -> None:
    ours, theirs = logits(0), logits(1)
    p, q = (theirs / temperature).softmax(-1), (ours / temperature).softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean() * temperature**2
    torch.testing.assert_close(kl(ours, theirs, temperature), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_of_the_whole_vocabulary_is_the_full_divergence_with_its_gradient(temperature: float) -> None:
    ours, theirs = logits(0).requires_grad_(), logits(1)
    full = kl(ours, theirs, temperature)
    (expected,) = torch.autograd.grad(full, ours)
    part = kl_of_top(ours, top(theirs, 100, temperature), temperature)
    (gradient,) = torch.autograd.grad(part, ours)
    torch.testing.assert_close(part, full)
    torch.testing.assert_close(gradient, expected)


def test_all_other_tokens_count_as_one() -> None:
    """Teacher (0.5, 0.3, 0.1, 0.1), student (0.4, 0.4, 0.15, 0.05), two tokens kept: 0.2 stands against 0.2."""
    theirs, ours = (torch.tensor(p).log().view(1, 1, 4) for p in ([0.5, 0.3, 0.1, 0.1], [0.4, 0.4, 0.15, 0.05]))
    expected = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4) + 0.2 * math.log(0.2 / 0.2)
    assert float(kl_of_top(ours, top(theirs, 2, 1.0), 1.0)) == pytest.approx(expected, abs=1e-6)


def test_fewer_tokens_give_a_lower_bound_and_one_more_never_lowers_it() -> None:
    ours, theirs = logits(0), logits(1)
    found = [float(kl_of_top(ours, top(theirs, k, 1.0), 1.0)) for k in range(1, 8)]
    assert found == sorted(found)
    assert 0 < found[0] < found[-1]


def test_rounding_on_disk_leaves_a_distribution() -> None:
    theirs = top(logits(1), 3, 1.0)
    coarse = Top(theirs.log_probs.half(), theirs.tokens)
    ours = logits(1).requires_grad_()
    loss = kl_of_top(ours, coarse, 1.0)
    # The student is the teacher, so nothing is left but rounding, and that is never negative.
    assert 0 <= loss.item() < 1e-5


def test_next_token_looks_one_ahead() -> None:
    ids = torch.tensor([[1, 2, 0]])
    rows = logits(3)[:1, :3]
    expected = -(rows[0, 0].log_softmax(-1)[2] + rows[0, 1].log_softmax(-1)[0]) / 2
    torch.testing.assert_close(next_token(rows, ids), expected)


def test_hidden_error_is_relative_for_each_token_and_leaves_padding_out() -> None:
    theirs = torch.tensor([[[3.0, 4.0], [300.0, 400.0], [1.0, 1.0]]])
    ours = theirs + torch.tensor([[[5.0, 0.0], [0.0, 500.0], [9.0, 9.0]]])
    assert float(hidden_error(ours, theirs, torch.tensor([[1, 1, 0]]))) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (((0, 0), (1, 1), (5, 5)), (0, 4, 7)),
        (((0, 2), (3, 3)), (2, 7)),
        (((0, None), (None, 1), (2, 2), (3, 3)), (0, 1, 2, 7)),
    ],
    ids=["stock", "repacked", "heterogeneous"],
)
def test_blocks_match_the_dense_block_before_the_next_survivor(pairs, expected) -> None:
    assert matches(pairs, 8) == expected
