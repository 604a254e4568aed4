"""Reads a folder of safetensors files lazily: headers are checked when it is opened, weights stay on disk."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.checkpoint.pickles import require_safetensors
from prunekit.core.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
# The format's own limit; larger claims come from damaged files.
_MAX_HEADER = 100_000_000
_MAX_JSON = 200_000_000
# Names in messages are cut after so many characters.
_LONGEST_NAME = 200
# Bytes of one value, by the codes of the safetensors format.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@cache
def torch_dtypes() -> dict[str, torch.dtype]:
    """Types of torch by the codes of the safetensors format."""
    import torch

    names = {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
        "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    }  # fmt: skip
    return {code: getattr(torch, name) for code, name in names.items() if hasattr(torch, name)}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Args:
        dtype: code of the safetensors format, such as `BF16`.
        shape: its dimensions.
        file: name of the file in the checkpoint's folder.
        start: first byte in the file.
        n_bytes: length.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    n_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Args:
        folder: the model's folder, only ever read.
        config: its `config.json`.
        tensors: all tensors by name.
        file_bytes: size of all weight files.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    file_bytes: int

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Reads the configuration and every header, and checks them; no weight is read.

        Raises:
            CheckpointError: if the folder is no checkpoint, is damaged, or names files outside itself.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"no folder `{folder}`")
        config = _json_object(folder / CONFIG)
        _check_names(config)
        where = _weight_map(folder)
        files = sorted(set(where.values())) if where is not None else [SINGLE]
        tensors: dict[str, TensorInfo] = {}
        total = 0
        for name in files:
            path = _inside(folder, name)
            found, size = _header(path, name)
            twice = next((tensor for tensor in found if tensor in tensors), None)
            if twice is not None:
                raise CheckpointError(
                    f"tensor `{twice[:_LONGEST_NAME]}` is in two files", why=f"{tensors[twice].file} and {name}"
                )
            tensors |= found
            total += size
        if where is not None:
            _check_index(where, tensors)
        return cls(folder, config, tensors, total)

    def read(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own.

        Raises:
            CheckpointError: if there is no such tensor, or its file has changed since it was opened.
        """
        info = self._info(name)
        return self._read(info, info.start, info.n_bytes, info.shape)

    def read_rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows `first` to `end` (not included) of a tensor of rank 1 or more."""
        info = self._info(name)
        if not info.shape or not 0 <= first <= end <= info.shape[0]:
            raise CheckpointError(f"`{name}` has no rows {first} to {end}", why=f"its shape is {list(info.shape)}")
        row = info.n_bytes // info.shape[0] if info.shape[0] else 0
        return self._read(info, info.start + first * row, (end - first) * row, (end - first, *info.shape[1:]))

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"no tensor `{name}`", at=str(self.folder))
        return self.tensors[name]

    def _read(self, info: TensorInfo, start: int, n_bytes: int, shape: tuple[int, ...]) -> Tensor:
        import torch

        dtype = torch_dtypes().get(info.dtype)
        if dtype is None:
            raise CheckpointError(f"this torch has no type for `{info.dtype}`", at=info.file)
        # A bytearray of its own: the tensor may be written to.
        data = bytearray(n_bytes)
        view, done = memoryview(data), 0
        try:
            with (self.folder / info.file).open("rb", buffering=0) as opened:
                while done < n_bytes:
                    got = os.preadv(opened.fileno(), [view[done:]], start + done)
                    if got == 0:
                        raise CheckpointError(f"`{info.file}` ends too early", why="it changed after it was opened")
                    done += got
        except OSError as error:
            raise CheckpointError(f"`{info.file}` cannot be read", why=error.strerror or str(error)) from error
        if n_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).view(shape)


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the folder."""
    try:
        if not path.is_file():
            raise CheckpointError(f"`{path.parent}` has no `{path.name}`", hint="a model is a Hugging Face folder")
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"`{path.name}` is larger than any real one", at=str(path))
        text = path.read_bytes()
        found = json.loads(text, parse_constant=_constant)
        _require_text(text, found)
    except OSError as error:
        raise CheckpointError(
            f"`{path.name}` cannot be read", why=error.strerror or str(error), at=str(path)
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"`{path.name}` is damaged", why=_first_words(error), at=str(path)) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"`{path.name}` is damaged", why="it holds no JSON object", at=str(path))
    return found


def _constant(name: str) -> float:
    """Some configurations hold Infinity, which JSON does not have; NaN stands for nothing."""
    if name == "NaN":
        raise ValueError("it holds NaN")
    return float(name)


def _require_text(text: bytes, found: Any) -> None:
    """Halves of characters, which JSON can write and no file can hold, are refused.

    Raises:
        ValueError: for a lone surrogate.
    """
    if b"\\ud" in text.lower():
        json.dumps(found, ensure_ascii=False).encode()


def _check_names(config: dict[str, Any]) -> None:
    """The names of classes that every reader of a configuration relies on."""
    model_type, classes = config.get("model_type", ""), config.get("architectures") or []
    if not isinstance(model_type, str) or len(model_type) > _LONGEST_NAME:
        raise CheckpointError("`model_type` is no name", why=f"it is {repr(model_type)[:100]}", at=CONFIG)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError("`architectures` is no list of names", why=f"it is {repr(classes)[:100]}", at=CONFIG)


def _first_words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _weight_map(folder: Path) -> dict[str, str] | None:
    """File by tensor of a sharded checkpoint; None where there is one file."""
    require_safetensors(folder)
    path = folder / INDEX
    if not path.exists():
        if not (folder / SINGLE).exists():
            others = sorted(file.name for file in folder.glob("*.safetensors"))
            hint = f"rename it to `{SINGLE}`" if len(others) == 1 else f"their index `{INDEX}` is missing"
            raise CheckpointError(f"`{folder}` has no `{SINGLE}`", why=f"it holds {', '.join(others[:3])}", hint=hint)
        return None
    found = _json_object(path).get("weight_map")
    sound = isinstance(found, dict) and found and all(isinstance(name, str) for name in found.values())
    if not sound:
        raise CheckpointError(f"`{INDEX}` is damaged", why="it maps no tensors to files", at=str(path))
    return dict(found)  # type: ignore[arg-type]


def _inside(folder: Path, name: str) -> Path:
    """A weight file by its name in the index, which must lie in the folder itself.

    Links are followed only where the hub's cache makes them: from `snapshots/<commit>` to `blobs` of one repository.
    """
    if not name.endswith(".safetensors") or Path(name).name != name or "\0" in name:
        why = "an index may only name .safetensors files beside it"
        raise CheckpointError(f"`{INDEX}` names `{name[:200]}`", why=why, at=str(folder))
    path = folder / name
    try:
        if not path.is_file():
            raise CheckpointError(f"`{name}` is missing", why=f"`{folder}` has no such file")
        real = path.resolve()
    except OSError as error:
        raise CheckpointError(f"`{name[:200]}` cannot be opened", why=error.strerror or str(error)) from error
    home = folder.resolve()
    allowed = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if real.parent not in allowed:
        raise CheckpointError(f"`{name}` is a link that leaves the folder", why=f"it leads to `{real}`", at=str(path))
    return path


def _header(path: Path, name: str) -> tuple[dict[str, TensorInfo], int]:
    """Tensors of one file, each checked, and the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise _damaged(name, f"its header claims {length} bytes, the file has {size}")
            text = opened.read(length)
        header = json.loads(text, object_pairs_hook=_no_twins)
        _require_text(text, header)
    except OSError as error:
        raise CheckpointError(f"`{name}` cannot be read", why=error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(name, _first_words(error)) from error
    if not isinstance(header, dict):
        raise _damaged(name, "its header is no table of tensors")
    header.pop("__metadata__", None)
    begin = 8 + length
    tensors = {tensor: _entry(name, tensor, entry, begin) for tensor, entry in header.items()}
    _check_tiling(name, tensors.values(), begin, size)
    return tensors, size


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice in its header")
    return found


def _damaged(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"`{name}` is damaged", why=why, hint="copy or download it again")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(file: str, name: str, entry: Any, begin: int) -> TensorInfo:
    shown = name[:_LONGEST_NAME]
    if not isinstance(entry, dict):
        raise _damaged(file, f"tensor `{shown}` has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _damaged(file, f"tensor `{shown}` has the unknown type `{str(dtype)[:40]}`")
    if not isinstance(shape, list) or not all(map(_whole, shape)):
        raise _damaged(file, f"tensor `{shown}` has no shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        raise _damaged(file, f"tensor `{shown}` has no place")
    length = offsets[1] - offsets[0]
    if length != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _damaged(
            file, f"tensor `{shown}` of shape {str(shape)[:_LONGEST_NAME]} cannot take {length} bytes as {dtype}"
        )
    return TensorInfo(dtype, tuple(shape), file, begin + offsets[0], length)


def _check_tiling(file: str, infos: Iterable[TensorInfo], begin: int, size: int) -> None:
    """Tensors must follow each other without gap or overlap up to the file's end."""
    place = begin
    for info in sorted(infos, key=lambda info: (info.start, info.n_bytes)):
        if info.start != place:
            raise _damaged(file, "its tensors overlap or leave gaps")
        place += info.n_bytes
    if place != size:
        raise _damaged(file, f"its tensors end at byte {place}, the file at {size}")


def _check_index(where: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """The index and the files must name the same tensors in the same places."""
    for name, file in where.items():
        if name not in tensors:
            raise CheckpointError(
                f"tensor `{name[:_LONGEST_NAME]}` is missing", why=f"`{INDEX}` expects it in `{file[:_LONGEST_NAME]}`"
            )
        if tensors[name].file != file:
            raise CheckpointError(
                f"`{INDEX}` is damaged", why=f"tensor `{name[:_LONGEST_NAME]}` lies in `{tensors[name].file}`"
            )
    extra = next((name for name in tensors if name not in where), None)
    if extra is not None:
        raise CheckpointError(
            f"`{INDEX}` is damaged", why=f"it does not name tensor `{extra[:_LONGEST_NAME]}` of its files"
        )
