"""Runs the portable kernel under Triton's interpreter and prints its errors as JSON; started by test_interpreted.py.

A process of its own: Triton decides when it is first imported whether its functions are interpreted.
"""

import json

import torch

from prunekit_kernels.block_sparse_prefill import cases, portable
from prunekit_kernels.block_sparse_prefill.reference import reference


def run(q, k, v, lists, starts, ends, keys):
    """The kernel over lists in one piece."""
    return portable.launch(
        q, k, v, lists.counts, lists.partials, lists.indices, lists.mask_ids, lists.masks, starts, ends,
        lists.block_q, lists.block_k, lists.q_offset, lists.causal, q.shape[-1] ** -0.5, portable.Tile(keys, 4, 2),
    )  # fmt: skip


def errors(case, dtype, keys):
    """Relative error of the output, worst error of the log-sum-exp, whether the same queries read nothing."""
    q, k, v, lists, starts, ends = cases.make(case, dtype, "cpu", seed=1)
    out, lse = run(q, k, v, lists, starts, ends, keys)
    expected, sums = reference(q.double(), k.double(), v.double(), lists, case.dim**-0.5, starts, ends)
    finite = sums > float("-inf")
    same = torch.equal(lse > float("-inf"), finite)
    return cases.relative_error(out, expected), (lse - sums)[finite].abs().max().item(), same


def keyless():
    """Whether queries without a key give zeros and minus infinity, and the others something finite."""
    case = cases.Case(1, 1, 1, 64, 64, 64, table=True, block_q=32, block_k=32)
    q, k, v, _, _, _ = cases.make(case, torch.float32, "cpu", seed=2)
    mask = torch.ones(1, 64, 64, dtype=torch.bool).tril()
    empty = torch.cat([torch.tensor([5]), torch.arange(32, 64)])
    mask[0, empty] = False
    out, lse = run(q, k, v, cases.lists_of(mask, case), None, None, 32)
    zeros = (out[0, 0, empty] == 0).all() and (lse[0, 0, empty] == float("-inf")).all()
    return bool(zeros and torch.isfinite(out).all())


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    found = {
        f"{case.name}-{dtype}": [errors(case, dtype, keys) for keys in sorted({32, case.block_k})]
        for case in cases.SMALL
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    print(json.dumps({"cases": found, "keyless": keyless()}))
