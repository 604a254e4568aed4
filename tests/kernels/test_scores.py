"""Scoring, summary, merge and gradient kernels: references against plain torch, kernels against the references."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from prunekit_kernels.block_scores import antidiagonal_scores, select_blocks
from prunekit_kernels.block_sparse_prefill import block_sparse_prefill, cases
from prunekit_kernels.block_sparse_prefill.reference import reference
from prunekit_kernels.merge import merge_attention
from prunekit_kernels.page_summaries import block_means, page_bounds
from prunekit_kernels.permute import permute_tokens
from tests.kernels.compare import GRADIENT
from tests.kernels.interpreter import under_interpreter

TYPES = (torch.float32, torch.bfloat16)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_gradients_equal_those_of_autograd_in_float64(case):
    q, k, v, lists, starts, ends = cases.make(case, torch.float64, "cpu", seed=3)
    lists = replace(lists, biases=draw(*lists.indices.shape, seed=4, dtype=torch.float32))
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    results = []
    for run in (block_sparse_prefill, lambda *a, **b: reference(*a[:3], lists, case.dim**-0.5, starts, ends)):
        out, lse = run(*leaves, lists, starts=starts, ends=ends)
        finite = lse.detach() > float("-inf")
        loss = (out * draw(*out.shape, seed=5)).sum() + (lse[finite] * draw(*lse.shape, seed=6)[finite]).sum()
        results.append(torch.autograd.grad(loss, leaves))
    for got, expected in zip(*results, strict=True):
        # The log-sum-exp between forward and backward is float32.
        assert cases.relative_error(got, expected) < 1e-6


def test_operation_with_gradients_passes_the_checks_of_torch():
    case = cases.SMALL[0]
    q, k, v, lists, _, _ = cases.make(case, torch.float32, "cpu", seed=0)
    leaves = [t.contiguous().requires_grad_() for t in (q, k, v)]
    arguments = (
        *leaves, lists.counts, lists.partials, lists.indices, None, None, None, None, 32, 32, lists.q_offset, True,
        True, 0.1,
    )  # fmt: skip
    results = torch.library.opcheck(torch.ops.prunekit.block_sparse_prefill.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_a_bias_of_log_r_stands_for_r_equal_keys():
    case = cases.Case(1, 2, 1, 64, 64, 64, causal=False, block_q=32, block_k=32)
    q, k, v, _, _, _ = cases.make(case, torch.float64, "cpu", seed=0)
    lists = cases.lists_of(torch.ones(1, 64, 64, dtype=torch.bool), case)
    biases = torch.where(lists.indices == 1, torch.log(torch.tensor(3.0)), torch.tensor(0.0))
    out, _ = block_sparse_prefill(q, k, v, replace(lists, biases=biases))
    wide = [torch.cat([t, t[:, :, 32:], t[:, :, 32:]], 2) for t in (k, v)]
    expected = scaled_dot_product_attention(q, *wide, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_two_halves_merge_into_the_whole():
    q, k, v = draw(1, 2, 40, 64), draw(1, 2, 40, 64, seed=1), draw(1, 2, 40, 64, seed=2)
    case = cases.Case(1, 2, 2, 40, 40, 64, causal=False, block_q=32, block_k=32)
    first = torch.zeros(1, 40, 40, dtype=torch.bool)
    first[:, :, :32] = True
    parts = [block_sparse_prefill(q, k, v, cases.lists_of(mask, case)) for mask in (first, ~first)]
    out, lse = merge_attention(*parts[0], *parts[1])
    expected, sums = block_sparse_prefill(q, k, v, cases.lists_of(first | ~first, case))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, sums)
    nothing = torch.full((2,), float("-inf"))
    assert merge_attention(torch.ones(2, 4), nothing, torch.ones(2, 4), nothing)[0].abs().sum() == 0
    with pytest.raises(ValueError, match="do not fit each other"):
        merge_attention(out, lse, out[:, :1], lse)


def test_antidiagonal_scores_sum_what_lies_on_antidiagonals():
    q, k = draw(1, 1, 8, 4), draw(1, 1, 8, 4, seed=1)
    scores = antidiagonal_scores(q, k, stride=2, block_q=4, block_k=4, scale=1.0)
    product = q[0, 0] @ k[0, 0].T
    folded = torch.tensor([[product[2 * i + 1, 2 * c] + product[2 * i, 2 * c + 1] for c in range(4)] for i in range(4)])
    weights = (folded / 2).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf")).softmax(-1)
    expected = weights.view(2, 2, 2, 2).sum((1, 3))
    torch.testing.assert_close(scores[0, 0], expected.float())
    with pytest.raises(ValueError, match="does not divide"):
        antidiagonal_scores(q, k, stride=3)


@pytest.mark.parametrize(("n", "runs"), [(64, (3, 7)), (40, (3, 4)), (27, (3,))])
def test_antidiagonal_scores_with_a_step_are_those_of_the_runs_that_are_scored(n, runs):
    q, k = draw(1, 2, n, 4), draw(1, 1, n, 4, seed=1)
    how = {"stride": 8, "scale": 1.0, "block_k": 32}
    # With blocks of one run each row is a run of queries.
    every = antidiagonal_scores(q, k, block_q=8, **how)
    got = antidiagonal_scores(q, k, block_q=32, step=4, **how)
    torch.testing.assert_close(got, every[:, :, list(runs)])
    with pytest.raises(ValueError, match="is not in every block"):
        antidiagonal_scores(q, k, block_q=32, step=8, **how)


def test_selection_keeps_what_it_must_and_then_the_best():
    scores = torch.tensor([[[0.0, 5.0, 1.0, 4.0, 9.0, 0.0]]])
    how = {"block_q": 32, "block_k": 32, "q_offset": 160}
    counts, partials, indices = select_blocks(scores, 32, 192, keep=4, **how)
    assert (counts.item(), partials.item(), indices[0, 0, :4].tolist()) == (4, 1, [5, 4, 1, 0])
    counts, _, indices = select_blocks(scores, 32, 192, mass=0.7, **how)
    assert indices[0, 0, : counts.item()].tolist() == [5, 4, 1, 0]
    counts, _, indices = select_blocks(scores, 32, 192, ascending=True, sink=0, **how)
    assert indices[0, 0, : counts.item()].tolist() == [1, 2, 3, 4, 5]
    counts, _, indices = select_blocks(scores[:, :, :4], 20, 116, keep=2, sink=0, block_q=32, block_k=32, q_offset=40)
    assert indices[0, 0].tolist()[: counts.item()] == [1, 0]


def test_summaries_of_a_last_page_that_is_not_full():
    x = draw(1, 2, 37, 8)
    low, high = page_bounds(x, 16)
    assert torch.equal(low[:, :, 2], x[:, :, 32:].amin(2))
    assert torch.equal(high[:, :, 0], x[:, :, :16].amax(2))
    torch.testing.assert_close(block_means(x, 16)[:, :, 2], x[:, :, 32:].mean(2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("antidiagonal_scores", (torch.randn(1, 2, 64, 16), torch.randn(1, 1, 64, 16), 8, 2, 32, 32, 0, True, 0.2)),
        ("select_blocks", (torch.rand(2, 2, 4), 32, 32, 64, 128, 64, True, 2, 0.0, 1, 1, 4, False)),
        ("page_bounds", (torch.randn(1, 2, 37, 8), 16)),
        ("block_means", (torch.randn(1, 2, 37, 8), 16)),
        ("page_scores", (torch.randn(1, 4, 1, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))),
        (
            "permute_tokens",
            (torch.randn(1, 2, 4, 8).requires_grad_(), torch.tensor([2, 0, 1, 3]), torch.tensor([1, 2, 0, 3])),
        ),
        ("merge_attention", (torch.randn(2, 3, 8), torch.randn(2, 3), torch.randn(2, 3, 8), torch.randn(2, 3))),
    ],
)
def test_operations_pass_the_checks_of_torch(name, arguments):
    results = torch.library.opcheck(getattr(torch.ops.prunekit, name).default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_permuted_tokens_come_back_with_their_gradients():
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).int()
    x = draw(2, 9, 3, 4).transpose(1, 2).requires_grad_()
    there = permute_tokens(x, order, order.argsort().int())
    assert torch.equal(there, x[:, :, order.long()])
    assert torch.equal(permute_tokens(there, order.argsort().int(), order), x)
    weights = draw(2, 3, 9, 4, seed=1)
    (grad,) = torch.autograd.grad((there * weights).sum(), x)
    assert torch.equal(grad, weights[:, :, order.argsort()])


@pytest.fixture(scope="module")
def interpreted():
    return under_interpreter(Path(__file__).parent / "interpret_scores.py", 600)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in cases.SMALL), (cases.SMALL[0], torch.bfloat16)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_interpreted_gradients_equal_float64(interpreted, case, dtype):
    (forward, *backward), lse = interpreted["gradients"][f"{case.name}-{dtype}"]
    assert forward <= cases.RELATIVE[dtype]
    assert max(backward) <= GRADIENT[dtype]
    assert lse <= cases.LSE_ABSOLUTE[dtype]


def test_interpreted_scores_equal_float64(interpreted):
    assert max(interpreted["folded"].values()) < 1e-5
    assert all(interpreted["selected"])


def test_interpreted_permutation_is_exact(interpreted):
    assert interpreted["permuted"]


def test_interpreted_kept_pages_are_those_of_the_reference(interpreted):
    assert interpreted["renewed"] == [True] * 4


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_interpreted_summaries_and_merge_equal_float64(interpreted, dtype):
    exact, means = interpreted["summarized"][str(dtype)]
    assert exact
    assert means <= cases.RELATIVE[dtype]
    assert interpreted["bounded"][str(dtype)] <= 1e-5
    error, same = interpreted["merged"][str(dtype)]
    assert error <= cases.RELATIVE[dtype]
    assert same


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in cases.LARGE if c.batch == 2], ids=lambda case: case.name)
def test_gradients_on_a_gpu_equal_float64(poison, case):
    q, k, v, lists, starts, ends = cases.make(case, torch.bfloat16, "cuda", seed=1)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    grad = torch.randn_like(q)
    out, _ = block_sparse_prefill(*leaves, lists, starts=starts, ends=ends)
    expected, _ = reference(*wide, lists, case.dim**-0.5, starts, ends)
    got = torch.autograd.grad(out, leaves, grad)
    right = torch.autograd.grad(expected, wide, grad.double())
    for a, b in zip(got, right, strict=True):
        assert cases.relative_error(a, b) <= GRADIENT[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("stride", "step"), [(16, 1), (16, 4), (8, 8), (32, 2)])
@pytest.mark.parametrize(("queries", "keys"), [(63, 63), (1000, 1000), (200, 1111), (4096, 4096)])
def test_antidiagonal_scores_on_a_gpu_equal_float64(poison, queries, keys, stride, step, causal):
    q, k = (draw(2, n, h, 128, seed=n + h, dtype=torch.bfloat16).transpose(1, 2) for n, h in ((queries, 8), (keys, 2)))
    how = {"stride": stride, "step": step, "q_offset": keys - queries, "causal": causal}
    got = antidiagonal_scores(q.cuda(), k.cuda(), **how)
    assert cases.relative_error(got.cpu(), antidiagonal_scores(q.double(), k.double(), **how)) < 2e-3
