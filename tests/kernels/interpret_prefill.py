"""Runs the portable prefill kernel interpreted and prints its errors as JSON; for test_block_sparse_prefill.py.

A process of its own: Triton decides when it is first imported whether its functions are interpreted.
"""

import json

import torch

from prunekit_kernels.block_sparse_prefill import backward, cases, portable
from prunekit_kernels.block_sparse_prefill.reference import backward_reference, reference
from tests.kernels import prefill
from tests.kernels.compare import errors


def run(q, k, v, lists, starts=None, ends=None, keys=32, **gates):
    """The kernel in steps of so many keys."""
    how = (starts, ends, *lists.numbers, q.shape[-1] ** -0.5, portable.Tile(keys, 4, 2))
    return portable.launch(q, k, v, *lists.tensors, *how, **gates)


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
    out, lse = run(q, k, v, cases.lists_of(mask, case))
    zeros = (out[0, 0, empty] == 0).all() and (lse[0, 0, empty] == float("-inf")).all()
    return bool(zeros and torch.isfinite(out).all())


def gated(case, free, dtype):
    """Errors with a gate on every key."""
    q, k, v, lists, starts, ends = cases.make(case, dtype, "cpu", seed=1)
    gates = prefill.gates_of(case)
    got = run(q, k, v, lists, starts, ends, gates=gates, free=free)
    exact = [t.double() for t in (q, k, v)]
    return errors(got, reference(*exact, lists, case.dim**-0.5, starts, ends, gates, free))


def wide(case, dtype):
    """Errors of the result and of the gradients with heads of 256."""
    q, k, v, lists, _, _ = cases.make(case, dtype, "cpu", seed=1)
    got = run(q, k, v, lists)
    exact = [t.double() for t in (q, k, v)]
    expected = reference(*exact, lists, case.dim**-0.5)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    how = (*lists.tensors, None, None, None, *lists.numbers, case.dim**-0.5)
    less = torch.zeros_like(got[1])
    found = backward.launch(grad, less, q, k, v, *got, *how)
    right = backward_reference(grad.double(), less, *exact, *expected, *how)
    return [*errors(got, expected), *(cases.relative_error(a, b) for a, b in zip(found, right, strict=True))]


def varlen(dtype):
    """Errors over sequences one behind another."""
    q, k, v, starts, ends, lists = prefill.varlen_inputs(dtype, "cpu", 32)
    exact = [t.double() for t in (q, k, v)]
    return errors(run(q, k, v, lists, starts, ends), reference(*exact, lists, 64**-0.5, starts, ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    found = {
        f"{case.name}-{dtype}": [off(case, dtype, keys) for keys in sorted({32, case.block_k})]
        for case in cases.SMALL
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    types = (torch.float32, torch.bfloat16)
    more = {
        "gated": {f"{n}-{t}": gated(*pair, t) for n, pair in enumerate(prefill.GATED) for t in types},
        "wide": {f"{n}-{t}": wide(case, t) for n, case in enumerate(prefill.WIDE) for t in types},
        "varlen": {str(t): varlen(t) for t in types},
    }
    print(json.dumps({"cases": found, "keyless": keyless(), **more}))
