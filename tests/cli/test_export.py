"""`prunekit export`: where it writes, and that a failure leaves nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prunekit.cli.export import export
from prunekit.core.errors import PrunekitError, UsageError
from tests.tiny import write_tiny


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(model_folder: Path, out_folder: Path, progress: Any) -> SimpleNamespace:
        (out_folder / "model.onnx").write_bytes(b"onnx")
        return SimpleNamespace(to_json=lambda: {"max_abs_diff": 1.5e-6})

    monkeypatch.setattr("prunekit.export.onnx.export_onnx", write)


def test_default_place_is_a_folder_beside_the_weights(invoke, exporter, tmp_path) -> None:
    done = invoke(export, tmp_path)
    assert done.exit_code == 0, done.exception
    assert (tmp_path / "onnx" / "model.onnx").read_bytes() == b"onnx"
    assert done.stdout.splitlines()[-1] == str(tmp_path / "onnx")
    assert "1.5e-06" in done.stdout


def test_existing_folder_is_refused(invoke, exporter, tmp_path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_text("old")
    assert isinstance(invoke(export, tmp_path).exception, PrunekitError)
    assert invoke(export, tmp_path, "--overwrite").exit_code == 0


def test_failed_export_leaves_nothing(invoke, monkeypatch, tmp_path) -> None:
    def fail(model_folder: Path, out_folder: Path, progress: Any) -> None:
        (out_folder / "half").write_text("x")
        raise PrunekitError("the export failed")

    monkeypatch.setattr("prunekit.export.onnx.export_onnx", fail)
    assert isinstance(invoke(export, tmp_path).exception, PrunekitError)
    assert list(tmp_path.iterdir()) == []


def test_unknown_format_is_a_usage_error(invoke, exporter, tmp_path) -> None:
    assert invoke(export, tmp_path, "--format", "pickle").exit_code == 2


@pytest.mark.parametrize("arguments", [("--type", "f16"), ("--format", "gguf", "--source", "x")])
def test_option_of_another_format_is_a_usage_error(invoke, exporter, tmp_path, arguments) -> None:
    error = invoke(export, tmp_path, *arguments).exception
    assert isinstance(error, UsageError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "format", "words"),
    [
        ("bert", "gguf", "is not written as GGUF"),
        ("qwen3", "deci", "`qwen3` cannot be DeciLM"),
        ("bert", "genai", "no decoder"),
        ("llama", "masked", "has no prunekit.json"),
    ],
)
def test_what_a_format_cannot_say_is_refused(invoke, tmp_path, family, format, words) -> None:
    folder = write_tiny(family, tmp_path / "m")
    before = sorted(folder.iterdir())
    error = invoke(export, folder, "--format", format).exception
    assert isinstance(error, PrunekitError)
    assert words in str(error)
    assert error.why or error.hint
    assert sorted(folder.iterdir()) == before
