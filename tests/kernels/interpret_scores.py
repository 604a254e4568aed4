"""Runs the scoring, summary, merge and gradient kernels under Triton's interpreter; started by test_scores.py.

A process of its own: Triton decides when it is first imported whether its functions are interpreted.
"""

import json
import random
from dataclasses import replace

import torch

from prunekit_kernels.block_scores import portable as scores
from prunekit_kernels.block_scores import reference as scores_reference
from prunekit_kernels.block_sparse_prefill import backward, cases, portable
from prunekit_kernels.block_sparse_prefill.reference import backward_reference, reference
from prunekit_kernels.merge import portable as merge
from prunekit_kernels.merge.op import merge_reference
from prunekit_kernels.page_summaries import KeptPages
from prunekit_kernels.page_summaries import portable as summaries
from prunekit_kernels.page_summaries.reference import (
    bounds_reference,
    means_reference,
    page_scores_reference,
    renew_reference,
)
from prunekit_kernels.permute import portable as permute
from tests.kernels.interpreter import on_one_thread_and_poisoned

# Batch, heads, key-value heads, queries, keys, head size, stride, step, blocks, causal.
FOLDED = (
    (1, 4, 2, 100, 100, 64, 8, 1, 32, 32, True),
    (1, 2, 2, 70, 200, 80, 8, 1, 64, 32, False),
    (2, 4, 2, 107, 171, 64, 4, 4, 32, 32, True),
    (1, 2, 1, 150, 150, 64, 8, 8, 64, 32, True),
)
# Each kind of list once, and rounding once.
GRADIENTS = (*((case, torch.float32) for case in cases.SMALL), (cases.SMALL[0], torch.bfloat16))


def gradients(case, dtype):
    """Relative errors of output and gradients with a bias on each block, worst error of the log-sum-exp."""
    q, k, v, lists, starts, ends = cases.make(case, dtype, "cpu", seed=3)
    random_numbers = torch.Generator().manual_seed(4)
    lists = replace(lists, biases=torch.randn(lists.indices.shape, generator=random_numbers))
    parts, numbers = (*lists.tensors, starts, ends), (*lists.numbers, case.dim**-0.5)
    out, lse = portable.launch(q, k, v, *parts, *numbers, portable.Tile(32, 4, 2), biases=lists.biases)
    wide = [t.double() for t in (q, k, v)]
    expected, sums = reference(*wide, lists, case.dim**-0.5, starts, ends)
    finite = sums > float("-inf")
    grad = torch.randn(out.shape, generator=random_numbers).to(dtype)
    less = torch.randn(lse.shape, generator=random_numbers) * finite
    given = (grad, less, q, k, v, out, lse, *parts, lists.biases, *numbers)
    whole = (backward.Layout(32, 32, 4, 2),) * 2
    halves = (backward.Layout(16, 32, 4, 2), backward.Layout(16, 32, 4, 2))
    right = backward_reference(grad.double(), less, *wide, expected, sums, *parts, lists.biases, *numbers)
    errors = [cases.relative_error(out, expected)]
    # In one piece, and with the readers of each block of keys cut among programs.
    for got in (backward.launch(*given, layouts=whole), backward.launch(*given, layouts=halves, chunk=1)):
        errors += [cases.relative_error(a, b) for a, b in zip(got, right, strict=True)]
    return errors, (lse - sums)[finite].abs().max().item()


def folded(shape, dtype):
    """Relative error of the antidiagonal scores."""
    batch, heads, kv_heads, queries, keys, dim, stride, step, block_q, block_k, causal = shape
    generator = torch.Generator().manual_seed(5)
    q, k = (
        torch.randn(batch, n, h, dim, generator=generator).to(dtype).transpose(1, 2)
        for n, h in ((queries, heads), (keys, kv_heads))
    )
    how = (stride, step, block_q, block_k, keys - queries, causal, dim**-0.5)
    return cases.relative_error(scores.folded(q, k, *how), scores_reference.folded_scores(q.double(), k.double(), *how))


def selected(seed):
    """Whether counts, masked counts and lists are those of sorting; scores are coarse, so that many are equal."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    block_q, block_k, n_keys = draw.choice((1, 16, 32)), draw.choice((16, 32)), draw.randint(1, 400)
    n_queries = draw.randint(1, min(n_keys, 3 * block_q))
    causal, sink, window = draw.random() < 0.7, draw.randint(0, 3), draw.randint(0, 3)
    rows, cols = -(-n_queries // block_q), -(-n_keys // block_k)
    keep, mass = ((0, 0.0), (draw.randint(1, 20), 0.0), (0, draw.choice((0.3, 0.5, 0.9))))[seed % 3]
    given = torch.randint(0 if mass else -20, 64, (2, rows, cols), generator=generator).float() / 64
    width = min(cols, max(keep, sink + 2 * window + -(-block_q // block_k))) if keep else cols
    how = (block_q, block_k, n_queries, n_keys, n_keys - n_queries, causal, keep, mass, sink, window, width)
    return all(
        torch.equal(a, b)
        for ascending in (False, True)
        for a, b in zip(
            scores.select(given, *how, ascending),
            scores_reference.select_reference(given, *how, ascending),
            strict=True,
        )
    )


def summarized(dtype):
    """Whether bounds are exact, and the worst relative error of means."""
    x = torch.randn(2, 3, 100, 80, generator=torch.Generator().manual_seed(6)).to(dtype)
    exact, worst = True, 0.0
    for page in (1, 16, 128):
        bounds = zip(summaries.launch(x, page, False), bounds_reference(x, page), strict=True)
        exact &= all(torch.equal(a, b) for a, b in bounds)
        worst = max(worst, cases.relative_error(summaries.launch(x, page, True)[0], means_reference(x.double(), page)))
    return exact, worst


def bounded(dtype):
    """Relative error of page scores, of views with room behind them."""
    generator = torch.Generator().manual_seed(8)
    q = torch.randn(2, 6, 1, 80, generator=generator).to(dtype)
    low, high = (torch.randn(2, 2, 90, 80, generator=generator).to(dtype)[:, :, :70] for _ in range(2))
    return cases.relative_error(
        summaries.bounds_scores(q, low, high), page_scores_reference(q.double(), low.double(), high.double())
    )


def renewed(page, mean):
    """Whether pages kept over steps, jumps, other and shorter caches are what the reference keeps, and no more made."""
    generator = torch.Generator().manual_seed(10)
    # Small integers, whose means of a full page are exact in bfloat16.
    draws = [torch.randint(-4, 5, (2, 2, 100, 80), generator=generator).to(torch.bfloat16) for _ in range(2)]
    mine, other = (KeptPages.room(draws[0], page, -(-100 // page), mean) for _ in range(2))
    firsts = []
    for which, rows in ((0, (20, 70)), (0, (21, 71)), (0, (37, 71)), (1, (38, 72)), (1, (39, 72)), (1, (5, 100))):
        filled = torch.tensor(rows, dtype=torch.int32)
        summaries.renew(draws[which], filled, mine)
        renew_reference(draws[which], filled, other)
        firsts.append(mine.first.tolist())
        pairs = [(mine.covered, other.covered), (mine.first, other.first), (mine.newest, other.newest)]
        if not all(
            torch.allclose(a, b, rtol=1e-2) for a, b in (*pairs, *zip(mine.summaries, other.summaries, strict=True))
        ):
            return False
    mine.covered.zero_()
    summaries.renew(draws[1], filled, mine)
    rows = [[row[0] for row in first] for first in firsts]
    last = [(n - 1) // page for n in (20, 70, 21, 71, 37, 71, 38, 72)]
    return rows == [[0, 0], last[0:2], last[2:4], [0, 0], last[6:8], [0, last[7]]] and not mine.first.any()


def permuted():
    """Whether tokens stored as models store them come in the order asked for."""
    generator = torch.Generator().manual_seed(9)
    x, order = torch.randn(2, 100, 3, 80, generator=generator).transpose(1, 2), torch.randperm(100, generator=generator)
    return torch.equal(permute.launch(x, order.int()), x[:, :, order])


def merged(dtype):
    """Relative error of a merge in which some rows read nothing, and whether the log-sum-exps agree."""
    generator = torch.Generator().manual_seed(7)
    a, b = (torch.randn(2, 3, 50, 80, generator=generator).to(dtype) for _ in range(2))
    a_lse, b_lse = (torch.randn(2, 3, 50, generator=generator) for _ in range(2))
    a_lse[0], b_lse[0, 0] = float("-inf"), float("-inf")
    out, lse = merge.launch(a, a_lse, b, b_lse)
    expected, sums = merge_reference(a.double(), a_lse, b.double(), b_lse)
    return cases.relative_error(out, expected), torch.allclose(lse, sums)


if __name__ == "__main__":
    on_one_thread_and_poisoned()
    types = (torch.float32, torch.bfloat16)
    print(
        json.dumps(
            {
                "gradients": {f"{case.name}-{t}": gradients(case, t) for case, t in GRADIENTS},
                "folded": {f"{n}-{t}": folded(shape, t) for n, shape in enumerate(FOLDED) for t in types},
                "selected": [selected(seed) for seed in range(12)],
                "summarized": {str(t): summarized(t) for t in types},
                "bounded": {str(t): bounded(t) for t in types},
                "permuted": permuted(),
                "renewed": [renewed(page, mean) for page in (1, 16) for mean in (False, True)],
                "merged": {str(t): merged(t) for t in types},
            }
        )
    )
