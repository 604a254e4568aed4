"""Weight files: valid, equal bit for bit, sharded and refused where they must be."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from prunekit.checkpoint import writer
from prunekit.checkpoint.reader import Checkpoint
from prunekit.checkpoint.writer import OutTensor, Stored, write_weights
from prunekit.core.errors import CheckpointError, SurgeryError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    """Five tensors of several types."""
    folder = tmp_path / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(6, 5, generator=generator).bfloat16(),
        "b": torch.randn(7, generator=generator),
        "c": torch.tensor(3, dtype=torch.int64),
        "d": torch.randint(0, 255, (3,), generator=generator).to(torch.uint8),
        "e": torch.empty(0, 4),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def stored(source: Checkpoint, name: str, new: str = "") -> OutTensor:
    info = source.tensors[name]
    return OutTensor(new or name, info.dtype, info.shape, Stored(source.folder / info.file, info.start))


def everything(source: Checkpoint) -> list[OutTensor]:
    """All stored tensors in the source's order, and a made one in two pieces."""
    names = sorted(source.tensors, key=lambda name: source.tensors[name].start)
    made = OutTensor("made", "F16", (4, 2), lambda: [torch.ones(1, 2).half(), torch.zeros(3, 2).half()])
    return [*(stored(source, name, f"new.{name}") for name in names), made]


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def same(folder: Path, source: Checkpoint) -> bool:
    found = loaded(folder)
    assert torch.equal(found.pop("made"), torch.tensor([[1.0, 1.0], *[[0.0, 0.0]] * 3]).half())
    assert found.keys() == {f"new.{name}" for name in source.tensors}
    return all(torch.equal(tensor, source.read(name.removeprefix("new."))) for name, tensor in found.items())


def test_one_file_without_an_index(source: Checkpoint, folder: Path) -> None:
    assert write_weights(folder, everything(source), 10**9) == ("model.safetensors",)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert same(folder, source)


def test_values_are_aligned(source: Checkpoint, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    write_weights(folder, everything(source)[::-1], 10**9)
    written = Checkpoint.open(folder).tensors.values()
    assert [info.start % writer.ITEM_BYTES[info.dtype] for info in written] == [0] * len(written)


def test_shards_hold_their_limit_and_have_an_index(source: Checkpoint, folder: Path) -> None:
    names = write_weights(folder, everything(source), 350)
    assert len(names) > 1
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert all((folder / name).stat().st_size <= 350 for name in names)
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(info.n_bytes for info in source.tensors.values()) + 16
    assert set(index["weight_map"].values()) == set(names)
    assert same(folder, source)


def test_tensor_above_the_limit_has_a_file_of_its_own(source: Checkpoint, folder: Path) -> None:
    assert len(write_weights(folder, everything(source), 1)) == 6
    assert same(folder, source)


def test_neighbours_are_copied_in_one_call(source: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = writer._copy
    monkeypatch.setattr(writer, "_copy", lambda *given: calls.append(given[3]) or real(*given))
    write_weights(folder, everything(source)[:-1], 10**9)
    assert calls == [sum(info.n_bytes for info in source.tensors.values())]


@pytest.mark.parametrize("answer", [errno.EXDEV, errno.ENOSYS, 0], ids=["other-disk", "unknown", "nothing"])
def test_each_way_of_copying_gives_the_same(
    source: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    def fails(*_: object) -> int:
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0

    monkeypatch.setattr(os, "copy_file_range", fails)
    (folder / "sendfile").mkdir()
    write_weights(folder / "sendfile", everything(source), 10**9)
    monkeypatch.setattr(os, "sendfile", fails)
    (folder / "memory").mkdir()
    write_weights(folder / "memory", everything(source), 10**9)
    assert same(folder / "sendfile", source)
    assert same(folder / "memory", source)


def test_disk_that_is_too_small_is_refused_before_anything_is_written(
    source: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10, 5, 5)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(SurgeryError, match="too small"):
        write_weights(folder, everything(source), 10**9)
    assert list(folder.iterdir()) == []


def test_disk_that_fills_up_is_named(source: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(SurgeryError, match="disk is full"):
        write_weights(folder, everything(source), 10**9)


def test_source_that_shrank_is_named(source: Checkpoint, folder: Path) -> None:
    os.truncate(source.folder / "model.safetensors", 400)
    with pytest.raises(CheckpointError, match="ends too early"):
        write_weights(folder, everything(source), 10**9)


@pytest.mark.parametrize(
    "made",
    [[torch.ones(3, 2).half()], [torch.ones(5, 2).half()], [torch.ones(4, 2).bfloat16()]],
    ids=["short", "long", "type"],
)
def test_made_tensor_must_be_what_was_announced(folder: Path, made: list[torch.Tensor]) -> None:
    with pytest.raises(SurgeryError, match="did not become"):
        write_weights(folder, [OutTensor("x", "F16", (4, 2), lambda: made)], 10**9)


def test_two_tensors_of_one_name_are_refused(source: Checkpoint, folder: Path) -> None:
    with pytest.raises(SurgeryError, match="`x`"):
        write_weights(folder, [stored(source, "a", "x"), stored(source, "b", "x")], 10**9)


def test_progress_counts_every_byte(source: Checkpoint, folder: Path) -> None:
    seen: list[float] = []

    class Counter:
        advance = seen.append

        @contextmanager
        def task(self, name: str, total: float | None = None, unit: str = "") -> Iterator[Counter]:
            seen.append(-(total or 0))
            assert unit == "bytes"
            yield self

    write_weights(folder, everything(source), 10**9, Counter())
    assert sum(seen) == 0


def test_files_have_the_mode_of_new_files(source: Checkpoint, folder: Path) -> None:
    (folder / "new").write_text("")
    write_weights(folder, everything(source), 10**9)
    modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in ("new", "model.safetensors")}
    assert len(modes) == 1
