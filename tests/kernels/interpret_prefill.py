"""Runs the portable prefill kernel interpreted and prints its errors as JSON; for test_block_sparse_prefill.py.

A process of its own: Triton decides when it is first imported whether its functions are interpreted.
"""

import json

import torch

from prunekit_kernels.block_sparse_prefill import backward, block_sparse_prefill, cases, portable
from prunekit_kernels.block_sparse_prefill.reference import backward_reference, reference
from tests.kernels import prefill
from tests.kernels.compare import errors
from tests.kernels.interpreter import on_one_thread_and_poisoned


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


def varlen(dtype, per_head, causal):
    """Errors over sequences one behind another, of the result and of the gradients."""
    q, k, v, starts, ends, lists = prefill.varlen_inputs(dtype, "cpu", 32, per_head=per_head, causal=causal)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    expected = block_sparse_prefill(*exact, lists, starts=starts, ends=ends)
    got = run(q, k, v, lists, starts, ends)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    how = (*lists.tensors, starts, ends, None, *lists.numbers, 64**-0.5)
    found = backward.launch(grad, torch.zeros_like(got[1]), q, k, v, *got, *how)
    right = torch.autograd.grad(expected[0], exact, grad.double())
    off = [cases.relative_error(a, b) for a, b in zip(found, right, strict=True)]
    return [*errors(got, [t.detach() for t in expected]), *off]


def far():
    """Errors as of `varlen` where keys and values lie more than 2 ** 31 elements behind the first, mostly unwritten."""
    case = cases.Case(1, 2, 1, 64, 64, 64, block_q=32, block_k=32)
    inputs, stride, first = cases.make(case, torch.float16, "cpu", seed=1), 2**15, 2**16
    lists, at, n = inputs[3], slice(first, first + 64), first + 64
    q = torch.zeros(1, 2, n, 64, dtype=torch.float16)
    torch.utils.deterministic.fill_uninitialized_memory = False
    memory = torch.empty(n * stride, dtype=torch.float16)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # Neighbours of 64 channels in rows as of many heads.
    k, v = (memory[64 * i :].as_strided((1, 1, n, 64), (64, 64, stride, 1)) for i in range(2))
    for whole, part in zip((q, k, v), inputs[:3], strict=True):
        whole[:, :, at] = part
    starts, ends = torch.tensor([first], dtype=torch.int32), torch.tensor([n], dtype=torch.int32)
    got = run(q, k, v, lists, starts, ends)
    exact = [t.double().requires_grad_() for t in inputs[:3]]
    expected = block_sparse_prefill(*exact, lists)
    grad = torch.zeros_like(q)
    grad[:, :, at] = 1
    how = (*lists.tensors, starts, ends, None, *lists.numbers, 64**-0.5)
    found = backward.launch(grad, torch.zeros_like(got[1]), q, k, v, *got, *how)
    right = torch.autograd.grad(expected[0].sum(), exact)
    off = [cases.relative_error(a[:, :, at], b) for a, b in zip(found, right, strict=True)]
    return [*errors([t[:, :, at] for t in got], [t.detach() for t in expected]), *off]


if __name__ == "__main__":
    on_one_thread_and_poisoned()
    found = {
        f"{case.name}-{dtype}": [off(case, dtype, keys) for keys in sorted({32, case.block_k})]
        for case in cases.SMALL
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    types = (torch.float32, torch.bfloat16)
    more = {
        "gated": {f"{n}-{t}": gated(*pair, t) for n, pair in enumerate(prefill.GATED) for t in types},
        "wide": {f"{n}-{t}": wide(case, t) for n, case in enumerate(prefill.WIDE) for t in types},
        "varlen": {f"{t}-{p}-{c}": varlen(t, p, c) for t in types for p in (False, True) for c in (False, True)},
    }
    print(json.dumps({"cases": found, "keyless": keyless(), "far": far(), **more}))
