"""Small data sets, and an encoder whose vectors are known."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ROWS = [{"text": f"{'good' if i % 2 else 'bad'} film number {i}", "label": i % 2} for i in range(12)]


def png(colour: tuple[int, int, int]) -> bytes:
    """A PNG of 16 x 16 pixels."""
    from PIL import Image

    held = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(held, "PNG")
    return held.getvalue()


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """Twelve texts of two classes."""
    file = tmp_path / "films.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Twelve images, six of each class."""
    for i in range(12):
        folder = tmp_path / "pictures" / ("blue" if i % 2 else "red")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(png((20 * i, 0, 0) if i % 2 == 0 else (0, 0, 20 * i)))
    return tmp_path / "pictures"


@pytest.fixture
def examples(tmp_path: Path) -> Callable[..., Any]:
    """`examples(vectors, labels)`: Examples with given embeddings, float [n, d], and labels."""
    from prunekit.datasets.examples import Examples, Settings
    from prunekit.datasets.source import open_source

    def make(vectors: np.ndarray, labels: np.ndarray | None = None, **settings: Any) -> Examples:
        rows = [
            {"text": f"{i}"} if labels is None else {"text": f"{i}", "label": int(labels[i])}
            for i in range(len(vectors))
        ]
        file = tmp_path / "made.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        encoder = SimpleNamespace(
            source="known",
            digest=str(np.asarray(vectors).tobytes()[:64]),
            max_tokens=8,
            vectors=lambda values, data: np.asarray(vectors, np.float32)[[int(v) for v in values]],
            causal=False,
            surprises=lambda values, data: np.array([[float(v), 0.5] for v in values], np.float32),
            counts=lambda values: np.array([len(v) for v in values], np.int32),
        )
        return Examples(open_source(file), encoder, Settings(cache=tmp_path / "cache", **settings))  # type: ignore[arg-type]

    return make
