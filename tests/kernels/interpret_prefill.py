"""Runs the portable prefill kernel interpreted and prints its errors as JSON; for test_block_sparse_prefill.py.

A process of its own: Triton decides when it is first imported whether its functions are interpreted.
"""

import json

import torch

from prunekit_kernels.block_sparse_prefill import cases, portable
from prunekit_kernels.block_sparse_prefill.reference import reference
from tests.kernels.compare import errors


def run(q, k, v, lists, starts, ends, keys):
    """The kernel over lists in one piece."""
    how = (starts, ends, *lists.numbers, q.shape[-1] ** -0.5, portable.Tile(keys, 4, 2))
    return portable.launch(q, k, v, *lists.tensors, *how)


def off(case, dtype, keys):
    """Errors of the kernel in steps of so many keys."""
    q, k, v, lists, starts, ends = cases.make(case, dtype, "cpu", seed=1)
    expected = reference(q.double(), k.double(), v.double(), lists, case.dim**-0.5, starts, ends)
    return errors(run(q, k, v, lists, starts, ends, keys), expected)


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
        f"{case.name}-{dtype}": [off(case, dtype, keys) for keys in sorted({32, case.block_k})]
        for case in cases.SMALL
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    print(json.dumps({"cases": found, "keyless": keyless()}))
