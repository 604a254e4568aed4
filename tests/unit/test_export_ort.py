"""Providers, and what counts as the same: noise, ties, lost rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from prunekit.core.errors import ExportError
from prunekit.export.ort import OnnxParity, _same_tokens, open_session, providers


def parity(diff: float, *, largest: float = 30.0, gap: float = 0.0) -> OnnxParity:
    """A comparison with a chosen outcome."""
    return OnnxParity(diff, largest, gap == 0.0, 8, gap, 1, ("CPUExecutionProvider",))


@pytest.mark.parametrize(
    ("available", "asked"),
    [
        (["CPUExecutionProvider"], ["CPUExecutionProvider"]),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]),
        (["AzureExecutionProvider", "CPUExecutionProvider"], ["CPUExecutionProvider"]),
    ],
    ids=["cpu", "cuda", "other"],
)
def test_cuda_is_asked_for_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, available: list[str], asked: list[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    assert providers() == asked


def test_noise_passes_and_more_fails() -> None:
    assert parity(1e-2).ok
    assert not parity(2e-2).ok
    assert not parity(1e-2, largest=1.0).ok
    assert not parity(float("nan")).ok


def test_tokens_may_part_at_a_tie_only() -> None:
    assert parity(1e-5, gap=1e-2).ok
    assert not parity(1e-5, gap=0.5).ok


def test_gap_is_taken_where_a_row_first_parts() -> None:
    logits = np.zeros((2, 1, 4), np.float32)
    logits[0, 0] = [0.0, 3.0, 2.75, 0.0]
    expected, found = np.array([[1, 1], [0, 0]]), np.array([[2, 3], [0, 0]])
    assert _same_tokens(expected, found, [logits, logits]) == (False, 0.25)
    assert _same_tokens(expected, expected, [logits, logits]) == (True, 0.0)


def test_missing_graph_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no `model\.onnx`") as caught:
        open_session(tmp_path)
    assert "prunekit export" in caught.value.hint
