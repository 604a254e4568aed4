"""Fuzzed headers, indexes and configurations: read and cut, or refused by one of our errors, in little memory.

`PRUNEKIT_FUZZ_EXAMPLES=10000` looks at so many of each, drawn anew each time.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.errors import PrunekitError
from prunekit.plan.cost import cost
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.broken import count
from tests.quantised import write_quantised
from tests.tiny import tiny_model, write_tiny

INDEX = "model.safetensors.index.json"
FAMILIES = ("llama", "mixtral", "gemma3_text", "bert", "smolvlm", "heterogeneous", "quantised")
# The folders hold some 100 KB; a claimed size that was believed would take far more.
MOST_BYTES = 16 << 20

examples = int(os.environ.get("PRUNEKIT_FUZZ_EXAMPLES") or 0)
fuzzed = settings(
    max_examples=examples or 40,
    deadline=None,
    derandomize=not examples,
    database=None,
    suppress_health_check=list(HealthCheck),
)

numbers = st.one_of(
    st.integers(-2, 200),
    st.sampled_from([2**31, 2**32 + 1, 2**53, 2**63 - 1, 2**64, 10**30, -(2**63)]),
    st.floats(),
    st.booleans(),
)
names = st.one_of(
    st.sampled_from(["", ".", "..", "a", "../b.safetensors", "/etc/passwd", "b\0.safetensors", "x" * 5000, "\ud800"]),
    st.text(max_size=12),
)
values = st.recursive(
    st.one_of(st.none(), numbers, names),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model(family)`: folder of a tiny model in shards; do not write to it."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            if family == "heterogeneous":
                view = ModelView.open(folder("llama"))
                keep = {"blocks.2.attention.kv_groups": [1], "blocks.3.ffn.neurons": [0, 2, 3]}
                engine.apply(view, Plan.make(view, ["blocks.1.attention"], keep), made[family])
            elif family == "quantised":
                dense = write_tiny("llama", made[family] / "dense")
                made[family] = write_quantised(dense, made[family] / "fp8", "fp8")
            else:
                tiny_model(family).save_pretrained(made[family], max_shard_size="60KB")
        return made[family]

    return folder


@contextmanager
def copied(folder: Path) -> Iterator[Path]:
    with TemporaryDirectory() as place:
        yield Path(shutil.copytree(folder, Path(place) / "model"))


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def require_readable(error: PrunekitError) -> None:
    assert error.what
    assert not error.what.endswith(".")
    assert len(error.what) + len(error.why) < 3000


def read_all(folder: Path) -> None:
    """Opens the folder and reads every tensor; errors of ours are fine, others go through."""
    with little_memory():
        try:
            checkpoint = Checkpoint.open(folder)
            for name, info in checkpoint.tensors.items():
                assert tuple(checkpoint.read(name).shape) == info.shape
            count(refused=False)
        except PrunekitError as error:
            require_readable(error)
            count(refused=True)


def cut(folder: Path) -> None:
    """Looks at the structure and drops the last block; errors of ours are fine, others go through."""
    target = folder.with_name("cut")
    target.mkdir()
    with little_memory():
        try:
            view = ModelView.open(folder)
            cost(view)
            engine.apply(view, Plan.make(view, [part.address for part in view.blocks[-1].sublayers]), target)
        except PrunekitError as error:
            require_readable(error)
            count(refused=True)
            return
        Checkpoint.open(target)
        count(refused=False)


def entries(draw: st.DrawFn) -> dict[str, Any]:
    """Tensors of a header that follow each other as they should, some fields of them replaced."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype, size = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("I8", 1), ("BOOL", 1), ("F64", 8)]))
        for width in shape:
            size *= width
        entry: Any = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
        for field in draw(st.lists(st.sampled_from(list(entry)), max_size=1)):
            entry[field] = draw(st.one_of(values, st.lists(numbers, max_size=3)))
        header[name] = draw(values) if draw(st.integers(0, 19)) == 0 else entry
    return header


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A safetensors file, mostly nearly right."""
    text = json.dumps(entries(draw)).encode("utf-8", "surrogatepass")
    if draw(st.booleans()):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.binary(max_size=4)) + text[place + draw(st.integers(0, 4)) :]
    length = draw(st.sampled_from([len(text)] * 5 + [0, len(text) - 1, len(text) + 1, 2**40, 2**63, 2**64 - 1]))
    return struct.pack("<Q", max(0, length)) + text + draw(st.binary(max_size=80))


@fuzzed
@given(content=files())
def test_header(model: Callable[[str], Path], content: bytes) -> None:
    with TemporaryDirectory() as place:
        shutil.copyfile(model("llama") / "config.json", Path(place) / "config.json")
        (Path(place) / "model.safetensors").write_bytes(content)
        read_all(Path(place))


def paths(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value inside JSON data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, value in inner for found in ((*path, key), *paths(value, (*path, key)))]


def damage(draw: st.DrawFn, whole: Any) -> Any:
    """The same JSON data with one to three places replaced, taken away or moved."""
    data = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        places = paths(data)
        if not places:
            return data
        *above, last = draw(st.sampled_from(places))
        place = data
        for key in above:
            place = place[key]
        what = draw(st.sampled_from(["replace", "replace", "delete", "near", "add"]))
        if what == "replace":
            place[last] = draw(values)
        elif what == "delete":
            del place[last]
        elif what == "near" and isinstance(place[last], int):
            place[last] = place[last] * draw(st.sampled_from([-1, 0, 2, 10**9])) + draw(st.integers(-1, 1))
        elif isinstance(place, dict):
            place[draw(names)] = draw(values)
    return data


@fuzzed
@given(data=st.data())
def test_index(model: Callable[[str], Path], data: st.DataObject) -> None:
    with copied(model("llama")) as folder:
        whole = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(damage(data.draw, whole)))
        read_all(folder)


@pytest.mark.parametrize("family", FAMILIES)
@fuzzed
@given(data=st.data())
def test_configuration(model: Callable[[str], Path], family: str, data: st.DataObject) -> None:
    with copied(model(family)) as folder:
        whole = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(damage(data.draw, whole)))
        cut(folder)
