"""Triton's interpreter, in a process of its own: Triton decides at its first import what is interpreted."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

ROOT = Path(__file__).parents[2]


def under_interpreter(script: Path, seconds: float = 300) -> Any:
    """What a script prints as JSON under the interpreter; skips where Triton is missing or too old for numpy."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 7) and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip(f"the interpreter of triton {version} fails on numpy {numpy.__version__}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def on_one_thread_and_poisoned() -> None:
    """For such a script: its processes share cores, and memory that nobody wrote holds NaN."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
