"""Model files of CTranslate2, sound and damaged."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prunekit.checkpoint.ctranslate2 import read_ctranslate2
from prunekit.core.errors import CheckpointError

TENSORS = {"a/weight": np.arange(6, dtype="<f4").reshape(2, 3), "b/bias": np.array([1, -2], "<f2")}


def text(name: str) -> bytes:
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def variable(name: str, tensor: np.ndarray, code: int, n_bytes: int | None = None) -> bytes:
    sizes = struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
    return (
        text(name) + sizes + struct.pack("<BI", code, tensor.nbytes if n_bytes is None else n_bytes) + tensor.tobytes()
    )


def model(
    version: int = 6, n_bytes: int | None = None, code: int = 0, twice: bool = False, alias: str = "a/weight"
) -> bytes:
    parts = [variable("a/weight", TENSORS["a/weight"], code, n_bytes), variable("b/bias", TENSORS["b/bias"], 4)]
    parts += parts[:1] * twice
    head = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(parts))
    return b"".join([head, *parts, struct.pack("<I", 1), text("c/weight"), text(alias)])


def test_tensors_and_names_that_stand_for_others(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(model())
    found = read_ctranslate2(tmp_path / "model.bin", "WhisperSpec")
    assert list(found) == ["a/weight", "b/bias", "c/weight"]
    np.testing.assert_array_equal(found["a/weight"], TENSORS["a/weight"])
    np.testing.assert_array_equal(found["b/bias"], TENSORS["b/bias"])
    np.testing.assert_array_equal(found["c/weight"], TENSORS["a/weight"])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda: model(version=5), "version 5"),
        (lambda: model().replace(b"WhisperSpec", b"AnotherSpec"), "`AnotherSpec`"),
        (lambda: model(n_bytes=20), "20 bytes"),
        (lambda: model(code=9), "type 9"),
        (lambda: model(twice=True), "comes twice"),
        (lambda: model(alias="nowhere"), "stands for `nowhere`"),
        (lambda: model() + b"x", "1 bytes follow"),
    ],
)
def test_damage_is_named(damage: Callable[[], bytes], why: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(damage())
    with pytest.raises(CheckpointError) as caught:
        read_ctranslate2(tmp_path / "model.bin", "WhisperSpec")
    assert why in caught.value.why


def test_every_cut_is_refused(tmp_path: Path) -> None:
    whole = model()
    for length in range(len(whole)):
        (tmp_path / "model.bin").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_ctranslate2(tmp_path / "model.bin", "WhisperSpec")


def test_claim_of_a_huge_tensor_takes_no_memory(tmp_path: Path) -> None:
    head = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 1)
    huge = text("a") + struct.pack("<B2I", 2, 2**16, 2**13) + struct.pack("<BI", 0, 2**31)
    (tmp_path / "model.bin").write_bytes(head + huge)
    with pytest.raises(CheckpointError, match="damaged"):
        read_ctranslate2(tmp_path / "model.bin", "WhisperSpec")
