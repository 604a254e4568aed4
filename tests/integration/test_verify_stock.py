"""`verify` on stock folders: good ones pass in fresh processes, each fault is found."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prunekit.export.verify import Check, VerifyReport, make_reference, verify


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded Llama of two blocks with tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def by_name(report: VerifyReport) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


def leftovers() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("prunekit-verify-*"))


def test_good_folder_passes_every_check_and_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    files, temporary = sorted(llama.rglob("*")), leftovers()
    report = verify(llama, make_reference(model))
    assert report.problems == ()
    assert report.max_abs_diff is not None
    assert report.max_abs_diff < 1e-12
    assert set(by_name(report)) >= {
        "loads with prunekit",
        "loads without prunekit",
        "computes the same without prunekit",
        "cache and no cache agree without prunekit",
        "left padding and none agree without prunekit",
        "cache holds what attention needs without prunekit",
        "embeddings are tied as configured without prunekit",
        "with and without prunekit agree",
    }
    assert sorted(llama.rglob("*")) == files
    assert leftovers() <= temporary


def test_changed_weight_fails_against_the_reference_folder(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = verify(folder, llama)
    assert not report.ok
    checks = by_name(report)
    assert not checks["computes the same without prunekit"].passed
    assert str(llama) in checks["computes the same without prunekit"].detail
    assert checks["with and without prunekit agree"].passed


def test_missing_tensor_and_wrong_dtype_are_named(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file({k: t.bfloat16() for k, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    report = verify(folder, make_reference(model))
    checks = by_name(report)
    assert "1 missing keys (`model.layers.1.mlp.down_proj.weight`)" in checks["loads without prunekit"].detail
    assert checks["dtype is the configuration's"].detail == "BF16, configured float32"
    assert not checks["dtype is the configuration's"].passed


def test_folder_that_is_no_checkpoint_is_a_failed_check(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    report = verify(tmp_path)
    assert [check.name for check in report.checks] == ["the folder can be read"]
    assert not report.ok


def test_process_that_hangs_is_ended(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    report = verify(llama, make_reference(model), timeout_s=0.01)
    assert by_name(report)["loads with prunekit"].detail == "the process took more than 0.01 seconds"
    assert report.max_abs_diff is None
