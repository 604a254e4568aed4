"""The portable kernel under Triton's interpreter against float64."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from prunekit_kernels.block_sparse_prefill import cases

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def interpreted():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 7) and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip(f"the interpreter of triton {version} fails on numpy {numpy.__version__}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests" / "kernels" / "interpret.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_kernel_equals_float64(interpreted, case, dtype):
    for error, lse_error, same_rows in interpreted["cases"][f"{case.name}-{dtype}"]:
        assert error <= cases.RELATIVE[dtype]
        assert lse_error <= cases.LSE_ABSOLUTE[dtype]
        assert same_rows


def test_kernel_gives_zeros_for_a_query_without_keys(interpreted):
    assert interpreted["keyless"]
