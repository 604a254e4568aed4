"""Refusals of the ONNX export: before any work, with the way out, and nothing left behind."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prunekit.core.errors import ExportError
from prunekit.export import _trace
from prunekit.export.onnx import export_onnx, require_packages


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes modules look as if they were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest))


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide(monkeypatch, "onnxruntime", "onnxscript")
    with pytest.raises(ExportError, match="`onnxscript`, `onnxruntime`") as caught:
        export_onnx(tmp_path / "absent", tmp_path / "onnx")
    assert "prunekit[onnx]" in caught.value.hint
    assert "prunekit[onnx-gpu]" in caught.value.hint


def test_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "transformers.exporters")
    with pytest.raises(ExportError, match=r"transformers\.exporters") as caught:
        require_packages()
    assert "transformers>=5.17" in caught.value.hint


def test_folder_in_use_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="not empty"):
        export_onnx(tmp_path / "absent", tmp_path / "onnx")
    assert (tmp_path / "onnx" / "mine.txt").read_text() == "mine"


def test_quiet_holds_back_everything_and_restores_it(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as hf_logging

    before = logging.root.manager.disable, hf_logging.is_progress_bar_enabled()

    def chatter() -> None:
        print("[torch.onnx] chatter")
        warnings.warn("chatter", stacklevel=1)
        logging.getLogger("torch.onnx").warning("chatter")
        raise KeyError("x")

    with pytest.raises(KeyError), _trace._quiet():
        chatter()
    said = capsys.readouterr()
    assert "chatter" not in said.out + said.err
    assert (logging.root.manager.disable, hf_logging.is_progress_bar_enabled()) == before


def graph(*names: str) -> Any:
    """A graph of nothing but inputs."""
    return SimpleNamespace(graph=SimpleNamespace(inputs=[SimpleNamespace(name=name) for name in names]))


def test_lost_mask_is_refused() -> None:
    given = ["input_ids", "attention_mask"]
    with pytest.raises(ExportError, match="`attention_mask`"):
        _trace._require_inputs(graph("input_ids", "past_key_values.0.key"), given, decoder=True)
    _trace._require_inputs(graph("input_ids", "attention_mask"), given, decoder=False)


def test_lost_cache_is_refused() -> None:
    with pytest.raises(ExportError, match="`past_key_values`"):
        _trace._require_inputs(graph("input_ids", "attention_mask"), ["input_ids", "attention_mask"], decoder=True)
