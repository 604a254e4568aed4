"""Losses of healing against plain second derivations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prunekit.heal._losses import Top, hidden_error, kl, kl_of_top, next_token, top
from prunekit.heal._relations import relation_error
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


def states(seed: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of 2 sequences of 5 tokens, heads of width 3."""
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, heads, 5, 3, generator=draw) for _ in range(3))
    return query, key, value


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "padded"])
def test_relations_are_compared_token_by_token_over_heads_joined(causal: bool) -> None:
    """Student of 4 heads, teacher of 6: two relation heads, of 2 and of 3 heads."""
    ours, theirs = states(0, 4), states(1, 6)
    mask = None if causal else torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    errors: list[float] = []
    for b in range(2):
        for t in range(5 if causal or b == 0 else 3):
            seen = range(t + 1) if causal else range(5 if b == 0 else 3)
            found = 0.0
            for a, c in zip(ours, theirs, strict=True):
                for r in range(2):
                    student, teacher = (
                        torch.stack([(x[b, h, t] * x[b, h, u]).sum() / math.sqrt(3 * n) for u in seen]).softmax(0)
                        for x, n, h in ((a, 2, slice(2 * r, 2 * r + 2)), (c, 3, slice(3 * r, 3 * r + 3)))
                    )
                    found += float((teacher * (teacher / student).log()).sum()) / 6
            errors.append(found)
    assert float(relation_error(ours, theirs, mask)) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_alike_relations_have_no_error_and_finite_gradients() -> None:
    ours = states(0, 4)
    for each in ours:
        each.requires_grad_()
    loss = relation_error(ours, states(0, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, ours))


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
