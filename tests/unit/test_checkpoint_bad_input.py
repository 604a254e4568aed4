"""Checkpoints that are damaged or made to harm: always one CheckpointError before any work, never anything else."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.errors import CheckpointError
from tests.broken import count

CONFIG = '{"model_type": "llama"}'
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """One file with two tensors."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG)
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards with a tensor each, and their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG)
    save_file({"a": torch.arange(6.0).view(2, 3)}, folder / SHARDS[0])
    save_file({"b": torch.ones(4)}, folder / SHARDS[1])
    write_index(folder, {"a": SHARDS[0], "b": SHARDS[1]})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}))


def packed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def with_header(folder: Path, header: object, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(packed(json.dumps(header).encode(), data))


def entry(dtype: str = "F32", shape: object = (2,), begin: object = 0, end: object = 8) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(folder: Path) -> CheckpointError:
    """Opening fails with the one error, whose text names what is wrong, and nothing in the folder changes."""
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    text = str(caught.value).splitlines()[0]
    assert text
    assert not text.endswith(".")
    count(refused=True)
    return caught.value


def words(error: CheckpointError) -> str:
    return " ".join(str(part) for part in (error, *vars(error).values()))


def test_sound_checkpoints_open(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    assert torch.equal(checkpoint.read("a"), torch.arange(6.0).view(2, 3))
    assert torch.equal(checkpoint.read_rows("a", 1, 2), torch.tensor([[3.0, 4.0, 5.0]]))


def test_sound_shards_open(sharded: Path) -> None:
    assert set(Checkpoint.open(sharded).tensors) == {"a", "b"}


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path / "nothing")


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    assert SHARDS[1] in words(refused(sharded))


@pytest.mark.parametrize("left", [0, 4, 8, 30, -1], ids=lambda left: f"left{left}")
def test_truncated_shard_is_named(sharded: Path, left: int) -> None:
    shard = sharded / SHARDS[0]
    shard.write_bytes(shard.read_bytes()[:left])
    assert SHARDS[0] in words(refused(sharded))


def test_trailing_bytes(single: Path) -> None:
    with (single / "model.safetensors").open("ab") as opened:
        opened.write(b"\0" * 8)
    assert "model.safetensors" in words(refused(single))


@pytest.mark.parametrize("kind", ["absolute", "parent", "nested parent", "link", "linked folder"])
def test_index_that_names_a_file_outside_the_folder(sharded: Path, kind: str) -> None:
    outside = sharded.parent / "outside"
    outside.mkdir()
    (sharded / SHARDS[1]).rename(outside / "b.safetensors")
    name = {
        "absolute": str(outside / "b.safetensors"),
        "parent": "../outside/b.safetensors",
        "nested parent": "x/../../outside/b.safetensors",
        "link": "b.safetensors",
        "linked folder": "x/b.safetensors",
    }[kind]
    if kind == "link":
        (sharded / "b.safetensors").symlink_to(outside / "b.safetensors")
    if kind == "linked folder":
        (sharded / "x").symlink_to(outside)
    write_index(sharded, {"a": SHARDS[0], "b": name})
    assert "b.safetensors" in words(refused(sharded))


@pytest.mark.parametrize("name", ["a\0b.safetensors", "", ".", "config.json", "a" * 5000])
def test_index_that_names_no_shard(sharded: Path, name: str) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": name})
    refused(sharded)


def test_single_file_that_links_outside(single: Path) -> None:
    (single / "model.safetensors").rename(single.parent / "elsewhere.safetensors")
    (single / "model.safetensors").symlink_to(single.parent / "elsewhere.safetensors")
    refused(single)


def test_links_of_the_hub_cache_open(single: Path, tmp_path: Path) -> None:
    """The hub keeps contents in `blobs` and links to them from `snapshots/<commit>`."""
    repo = tmp_path / "models--me--mine"
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in single.iterdir():
        file.rename(repo / "blobs" / file.name[:4])
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name[:4])
    assert set(Checkpoint.open(snapshot).tensors) == {"a", "b"}


@pytest.mark.parametrize(
    "weight_map",
    [None, [], "x", {"a": 1, "b": None}, {"a": [SHARDS[0]]}, {}],
    ids=["none", "list", "text", "numbers", "lists", "empty"],
)
def test_index_of_the_wrong_kind(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    refused(sharded)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 200_000, b'{"weight_map": NaN}', b"1" * 20_000])
@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_damaged_json_is_named(sharded: Path, name: str, text: bytes) -> None:
    (sharded / name).write_bytes(text)
    assert name in words(refused(sharded))


def test_missing_config(single: Path) -> None:
    (single / "config.json").unlink()
    assert "config.json" in words(refused(single))


def test_index_that_names_the_wrong_shard(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[1], "b": SHARDS[0]})
    refused(sharded)


def test_index_that_names_a_tensor_no_shard_holds(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]})
    assert "c" in words(refused(sharded))


def test_name_in_two_shards(sharded: Path) -> None:
    save_file({"b": torch.ones(4), "a": torch.zeros(2, 3)}, sharded / SHARDS[1])
    assert "`a`" in words(refused(sharded))


@pytest.mark.parametrize("length", [0, 1, 7, 10**9, 2**40, 2**63 - 1, 2**63, 2**64 - 1], ids=lambda n: f"length{n}")
def test_header_length_that_lies(single: Path, length: int) -> None:
    weights = single / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", length) + weights.read_bytes()[8:])
    refused(single)


def test_header_length_that_lies_in_a_huge_file(single: Path) -> None:
    """A sparse file is as long as the header claims; it is refused without reading 2 GB."""
    weights = single / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", 2**31))
    os.truncate(weights, 2**31 + 8)
    refused(single)


@pytest.mark.parametrize(
    "header", [b"", b"{", b"[]", b"null", b'"x"', b"\xff" * 9, b"[" * 300_000, b'{"a": 1}', b"9" * 20_000]
)
def test_header_that_is_no_table_of_tensors(single: Path, header: bytes) -> None:
    (single / "model.safetensors").write_bytes(packed(header, b"\0" * 8))
    refused(single)


def test_header_that_names_a_tensor_twice(single: Path) -> None:
    one = json.dumps(entry())
    header = f'{{"a": {one}, "a": {one}}}'.encode()
    (single / "model.safetensors").write_bytes(packed(header, b"\0" * 8))
    refused(single)


@pytest.mark.parametrize(
    ("tensors", "n_bytes"),
    [
        ({"a": entry(shape=[3])}, 8),
        ({"a": entry(shape=[2], end=4)}, 4),
        ({"a": entry(begin=8, end=0)}, 8),
        ({"a": entry(begin=-8, end=0)}, 8),
        ({"a": entry(begin=8, end=16)}, 8),
        ({"a": entry(begin=8, end=16)}, 16),
        ({"a": entry(), "b": entry()}, 8),
        ({"a": entry(shape=[4], end=16), "b": entry(begin=8, end=16)}, 16),
        ({"a": entry(shape=[2**62, 4], begin=0, end=0)}, 0),
        ({"a": entry(shape=[2**31, 2**33], end=0)}, 0),
        ({"a": entry(shape=[-2])}, 8),
        ({"a": entry(shape=[-2, -1])}, 8),
        ({"a": entry(shape=[2.0])}, 8),
        ({"a": entry(shape=[True, 2])}, 8),
        ({"a": entry(shape=["2"])}, 8),
        ({"a": entry(shape=[float("nan")])}, 8),
        ({"a": entry(shape=[float("inf")])}, 8),
        ({"a": entry(shape=2)}, 8),
        ({"a": entry(shape=None)}, 8),
        ({"a": entry(shape={"0": 2})}, 8),
        ({"a": entry(begin=float("nan"))}, 8),
        ({"a": entry(end=8.0)}, 8),
        ({"a": entry(begin=False)}, 8),
        ({"a": entry(begin="0")}, 8),
        ({"a": entry(begin=None)}, 8),
        ({"a": entry(end=10**30)}, 8),
        ({"a": entry(dtype="F33")}, 8),
        ({"a": entry(dtype="")}, 8),
        ({"a": {**entry(), "dtype": 3}}, 8),
        ({"a": {**entry(), "dtype": ["F32"]}}, 8),
        ({"a": {**entry(), "data_offsets": [0]}}, 8),
        ({"a": {**entry(), "data_offsets": [0, 8, 8]}}, 8),
        ({"a": {**entry(), "data_offsets": {"0": 0}}}, 8),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8),
        ({"a": [1]}, 8),
        ({"a": None}, 8),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else str(value),
)
def test_header_entry_that_lies(single: Path, tensors: dict[str, Any], n_bytes: int) -> None:
    with_header(single, tensors, b"\0" * n_bytes)
    assert "model.safetensors" in words(refused(single))


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_shard_that_is_no_file(single: Path, kind: str) -> None:
    weights = single / "model.safetensors"
    weights.unlink()
    if kind == "folder":
        weights.mkdir()
    else:
        os.mkfifo(weights)
    refused(single)


def test_unknown_tensor_is_refused_when_read(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    with pytest.raises(CheckpointError, match="`c`"):
        checkpoint.read("c")


def test_shard_that_shrinks_after_opening_is_refused_when_read(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    weights = single / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(CheckpointError):
        [checkpoint.read(name) for name in checkpoint.tensors]


def _flip(data: bytearray, rng: random.Random, end: int) -> None:
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(end)] = rng.randrange(256)


def _swap_digits(data: bytearray, rng: random.Random, end: int) -> None:
    places = [place for place in range(8, end) if chr(data[place]).isdigit()]
    for place in rng.sample(places, k=rng.randint(1, 3)):
        data[place] = rng.choice(b"0123456789-.eE")


def _delete(data: bytearray, rng: random.Random, end: int) -> None:
    place = rng.randrange(end)
    del data[place : place + rng.randint(1, 9)]


def _insert(data: bytearray, rng: random.Random, end: int) -> None:
    words = [b"[", b"]", b"{", b"}", b",", b":", b'"', b"null", b"NaN", b"1e999", b"-0", b"\\u0000", bytes(3)]
    place = rng.randrange(end)
    data[place:place] = rng.choice(words)


def _repeat(data: bytearray, rng: random.Random, end: int) -> None:
    first = rng.randrange(8, end)
    data[first:first] = data[first : first + rng.randint(1, 40)]


MUTATIONS: tuple[Callable[[bytearray, random.Random, int], None], ...] = (
    _flip,
    _swap_digits,
    _delete,
    _insert,
    _repeat,
)


def test_random_damage_of_the_header_never_raises_anything_else(single: Path) -> None:
    seed = int(os.environ.get("PRUNEKIT_FUZZ_SEED") or random.SystemRandom().randrange(2**32))
    print(f"PRUNEKIT_FUZZ_SEED={seed}")
    rng = random.Random(seed)
    whole = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4), "c": torch.zeros(2, dtype=torch.int8)})
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    refusals = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        rng.choice(MUTATIONS)(damaged, rng, end)
        # Half of them keep an honest length, so that the damage reaches the parts behind it.
        if rng.random() < 0.5 and len(damaged) >= 8:
            damaged[:8] = struct.pack("<Q", end - 8 + len(damaged) - len(whole))
        (single / "model.safetensors").write_bytes(damaged)
        try:
            checkpoint = Checkpoint.open(single)
            for name, info in checkpoint.tensors.items():
                assert tuple(checkpoint.read(name).shape) == tuple(info.shape)
            count(refused=False)
        except CheckpointError:
            refusals += 1
            count(refused=True)
    assert refusals > 500
