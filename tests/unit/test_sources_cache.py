"""The cache of converted and unpacked models: made once, whole or not at all."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prunekit.checkpoint.cache import cache_folder, cached
from prunekit.core.errors import CheckpointError


def write_model(folder: Path) -> None:
    save_file({"weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_cached_folder_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(fresh: Path) -> None:
        made.append(fresh)
        write_model(fresh)

    assert cached(tmp_path / "cache" / "m", make) == cached(tmp_path / "cache" / "m", make) == tmp_path / "cache" / "m"
    assert len(made) == 1


def test_asking_twice_at_once_makes_it_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(fresh: Path) -> None:
        made.append(fresh)
        time.sleep(0.2)
        write_model(fresh)

    threads = [threading.Thread(target=cached, args=(tmp_path / "m", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert visible(tmp_path) == ["m"]


def test_failure_leaves_nothing_and_the_next_try_works(tmp_path: Path) -> None:
    def fail(fresh: Path) -> None:
        write_model(fresh)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "m", fail)
    assert visible(tmp_path) == []
    assert cached(tmp_path / "m", write_model).is_dir()


def test_damaged_folder_is_made_again(tmp_path: Path) -> None:
    folder = cached(tmp_path / "m", write_model)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    cached(folder, write_model)
    assert weights.read_bytes() == whole


def test_cache_that_cannot_be_written_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write to the cache folder") as caught:
        cached(tmp_path / "file" / "m", write_model)
    assert "PRUNEKIT_CACHE" in caught.value.hint


def test_cache_folder_follows_argument_then_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "variable"))
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert cache_folder() == tmp_path / "variable"
    monkeypatch.delenv("PRUNEKIT_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "prunekit"
