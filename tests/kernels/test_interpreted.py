"""The portable kernel under Triton's interpreter against float64."""

from pathlib import Path

import pytest
import torch

from prunekit_kernels.block_sparse_prefill import cases
from tests.kernels.interpreter import under_interpreter


@pytest.fixture(scope="session")
def interpreted():
    return under_interpreter(Path(__file__).parent / "interpret.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_kernel_equals_float64(interpreted, case, dtype):
    for error, lse_error, same_rows in interpreted["cases"][f"{case.name}-{dtype}"]:
        assert error <= cases.RELATIVE[dtype]
        assert lse_error <= cases.LSE_ABSOLUTE[dtype]
        assert same_rows


def test_kernel_gives_zeros_for_a_query_without_keys(interpreted):
    assert interpreted["keyless"]
