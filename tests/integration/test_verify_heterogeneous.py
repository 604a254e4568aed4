"""Heterogeneous folders: ONNX export, and `verify` by prunekit and by the folder's own modeling file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import prunekit.modeling
from prunekit.export.onnx import export_onnx
from prunekit.export.ort import OrtDecoder, compare_onnx
from prunekit.export.verify import MODELING_FILE, Check, VerifyReport, verify
from prunekit.modeling.families import hetero_config_fields

HEAD = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks: no attention in 0; one of two KV groups in 1; no FFN in 2."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("heterogeneous")
    LlamaForCausalLM(config).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    gone = ("layers.0.self_attn", "layers.0.input_layernorm", "layers.2.mlp", "layers.2.post_attention_layernorm")
    tensors = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in gone)}
    attention = "model.layers.1.self_attn"
    for name, rows in (("q_proj", 2 * HEAD), ("k_proj", HEAD), ("v_proj", HEAD)):
        tensors[f"{attention}.{name}.weight"] = tensors[f"{attention}.{name}.weight"][:rows].contiguous()
    tensors[f"{attention}.o_proj.weight"] = tensors[f"{attention}.o_proj.weight"][:, : 2 * HEAD].contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    layers: dict[str, Any] = {
        "00": {"skip": ["attention"]},
        "01": {"num_key_value_heads": 1, "num_attention_heads": 2},
        "02": {"skip": ["mlp"]},
    }
    fields = json.loads((path / "config.json").read_text())
    fields |= hetero_config_fields("llama", fields["architectures"])
    fields["prunekit"] = {"schema": 1, "base_model_type": "llama", "per_layer_config": layers}
    (path / "config.json").write_text(json.dumps(fields))
    shutil.copyfile(Path(prunekit.modeling.__path__[0]) / MODELING_FILE, path / MODELING_FILE)
    return path


def by_name(report: VerifyReport) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


def test_graph_has_a_cache_for_attention_that_is_left(folder: Path, tmp_path: Path) -> None:
    report = export_onnx(folder, tmp_path / "onnx")
    assert report.cached_layers == 2
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["model_type"] == "llama"
    runner = OrtDecoder(tmp_path / "onnx")
    assert runner.inputs["past_key_values.0.key"].shape == ["batch_size", "kv_heads_1", "past_sequence_length", HEAD]
    assert runner.inputs["past_key_values.1.key"].shape == ["batch_size", "kv_heads_2", "past_sequence_length", HEAD]
    parity = compare_onnx(folder, tmp_path / "onnx", new_tokens=8)
    assert parity.same_greedy_tokens
    assert parity.max_abs_diff < 1e-5


def test_folder_loads_by_prunekit_and_by_its_own_file(folder: Path) -> None:
    report = verify(folder)
    assert report.problems == ()
    checks = by_name(report)
    assert checks["loads with prunekit"].passed
    assert checks["loads by its own modeling file"].passed
    assert checks["does not load by mistake"].passed
    assert checks["cache holds what attention needs with prunekit"].detail == "2 layers with a cache, expected 2"
    assert checks["with and without prunekit agree"].passed


def test_changed_modeling_file_is_never_run(folder: Path, tmp_path: Path) -> None:
    copy, trace = shutil.copytree(folder, tmp_path / "copy"), tmp_path / "it ran"
    with (copy / MODELING_FILE).open("a") as file:
        file.write(f"\nopen({str(trace)!r}, 'w')\n")
    report = verify(copy)
    assert not report.ok
    assert not by_name(report)[f"{MODELING_FILE} is prunekit's"].passed
    assert "loads by its own modeling file" not in by_name(report)
    assert not trace.exists()
