"""Runs column statistics, cache compaction, gates, varlen and wide heads interpreted; started by test_kept.py.

A process of its own: Triton decides when it is first imported whether its functions are interpreted.
"""

import json

import torch

from prunekit_kernels.block_sparse_prefill import backward, cases, portable
from prunekit_kernels.block_sparse_prefill.reference import backward_reference, reference
from prunekit_kernels.cache_compact import portable as compact
from prunekit_kernels.cache_compact.reference import compact_reference
from prunekit_kernels.column_stats import portable as stats
from prunekit_kernels.sparse_decode import cases as decode
from tests.kernels import kept
from tests.kernels.compare import errors


def counted(shape, dtype):
    """Relative errors of sums and largest values against the matrix itself."""
    *arguments, weights = kept.stats_inputs(shape, dtype, "cpu")
    sums, most = stats.launch(*arguments, keys=32, queries=16)
    return cases.relative_error(sums, weights.sum(2)), cases.relative_error(most, weights.amax(2))


def prefill(q, k, v, lists, starts, ends, **more):
    how = (starts, ends, *lists.numbers, q.shape[-1] ** -0.5, portable.Tile(32, 4, 2))
    return portable.launch(q, k, v, *lists.tensors, *how, **more)


def gated(case, free, dtype):
    q, k, v, lists, starts, ends = cases.make(case, dtype, "cpu", seed=1)
    gates = kept.gates_of(case)
    got = prefill(q, k, v, lists, starts, ends, gates=gates, free=free)
    wide = [t.double() for t in (q, k, v)]
    return errors(got, reference(*wide, lists, case.dim**-0.5, starts, ends, gates, free))


def wide(case, dtype):
    """Errors of the result and of the gradients with heads of 256."""
    q, k, v, lists, _, _ = cases.make(case, dtype, "cpu", seed=1)
    got = prefill(q, k, v, lists, None, None)
    exact = [t.double() for t in (q, k, v)]
    expected = reference(*exact, lists, case.dim**-0.5)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    how = (*lists.tensors, None, None, None, *lists.numbers, case.dim**-0.5)
    less = torch.zeros_like(got[1])
    found = backward.launch(grad, less, q, k, v, *got, *how)
    right = backward_reference(grad.double(), less, *exact, *expected, *how)
    return [*errors(got, expected), *(cases.relative_error(a, b) for a, b in zip(found, right, strict=True))]


def varlen(dtype):
    q, k, v, starts, ends, lists = kept.varlen_inputs(dtype, "cpu", 32)
    got = prefill(q, k, v, lists, starts, ends)
    exact = [t.double() for t in (q, k, v)]
    return errors(got, reference(*exact, lists, 64**-0.5, starts, ends))


def compacted(case, dtype, page):
    """Whether every bit of the pools is that of the reference."""
    _, k, v, lists = decode.make(case, dtype, "cpu", seed=1)
    counts = (lists.tokens + page - 1) // page
    ends = counts.flatten().cumsum(0)
    first = (ends - counts.flatten()).view_as(counts).to(torch.int32)
    arguments = (k, v, lists.indices, lists.starts, lists.tokens, first, lists.page_tokens, lists.paged, page)
    got = compact.launch(*arguments, int(ends[-1]), lists.longest)
    expected = compact_reference(*arguments, int(ends[-1]))
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    types = (torch.float32, torch.bfloat16)
    print(
        json.dumps(
            {
                "stats": {f"{n}-{t}": counted(shape, t) for n, shape in enumerate(kept.STATS) for t in types},
                "gated": {f"{n}-{t}": gated(*pair, t) for n, pair in enumerate(kept.GATED) for t in types},
                "wide": {f"{n}-{t}": wide(case, t) for n, case in enumerate(kept.WIDE) for t in types},
                "varlen": {str(t): varlen(t) for t in types},
                "compacted": {
                    case.name: [compacted(case, t, page) for t in types for page in (1, 16)] for case in decode.SMALL
                },
            }
        )
    )
