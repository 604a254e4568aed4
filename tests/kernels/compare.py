"""How far the result of a kernel is from what is expected, and how far it may be."""

import torch

from prunekit_kernels.block_sparse_prefill import cases

# Gradients sum products of two rounded matrices.
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def errors(got, expected):
    """Relative error of the output, worst error of the log-sum-exp, whether the same queries read nothing.

    Args:
        got: output and log-sum-exp; `expected` alike.
    """
    (out, lse), (right, sums) = got, expected
    finite = sums > float("-inf")
    worst = (lse - sums)[finite].abs().max().item() if finite.any() else 0.0
    return cases.relative_error(out, right), worst, torch.equal(lse > float("-inf"), finite)


def expect_close(found, dtype):
    """Fails where `errors` of a kernel that reads this type are more than rounding explains."""
    error, lse_error, same_rows = found
    assert error <= cases.RELATIVE[dtype]
    assert lse_error <= cases.LSE_ABSOLUTE[dtype]
    assert same_rows
