"""Runs column statistics and cache compaction interpreted; started by test_eviction.py.

A process of its own: Triton decides when it is first imported whether its functions are interpreted.
"""

import json

import torch

from prunekit_kernels.block_sparse_prefill.cases import relative_error
from prunekit_kernels.cache_compact import portable as compact
from prunekit_kernels.cache_compact.reference import compact_reference
from prunekit_kernels.column_stats import portable as stats
from prunekit_kernels.sparse_decode import cases as decode
from tests.kernels import eviction
from tests.kernels.interpreter import on_one_thread_and_poisoned


def counted(shape, dtype):
    """Relative errors of sums and largest values against the matrix itself."""
    *arguments, weights = eviction.stats_inputs(shape, dtype, "cpu")
    sums, most = stats.launch(*arguments, keys=32, queries=16)
    return relative_error(sums, weights.sum(2)), relative_error(most, weights.amax(2))


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
    on_one_thread_and_poisoned()
    types = (torch.float32, torch.bfloat16)
    print(
        json.dumps(
            {
                "stats": {f"{n}-{t}": counted(shape, t) for n, shape in enumerate(eviction.STATS) for t in types},
                "compacted": {
                    case.name: [compacted(case, t, page) for t in types for page in (1, 16)] for case in decode.SMALL
                },
            }
        )
    )
