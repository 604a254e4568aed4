"""A model file of CTranslate2, as tensors by name; nothing in it is run, and its sizes are checked."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.core.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

_VERSION = 6
# Numbers of the format for types that weights are stored in.
_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_MOST_RANK = 8


def read_ctranslate2(file: Path, spec: str) -> dict[str, np.ndarray]:
    """Tensors of a model file, each a copy in memory.

    The file is: version, name of the specification, its revision, number of variables; for each its name, rank,
    sizes, type, bytes; then names that stand for others. Numbers are little-endian, names have their length before.

    Args:
        file: `model.bin`.
        spec: name of the specification that it must have, such as `WhisperSpec`.
    Raises:
        CheckpointError: for another version or specification, and for a file that is cut off or does not add up.
    """
    data = _Bytes(file)
    version, found = data.number("<I"), data.text()
    if version != _VERSION or found != spec:
        why = f"it has version {version} and `{found[:40]}`"
        raise CheckpointError(f"`{file.name}` is no CTranslate2 file of version {_VERSION} with `{spec}`", why=why)
    data.number("<I")
    tensors: dict[str, np.ndarray] = {}
    for _ in range(data.number("<I")):
        name = data.text()
        if name in tensors:
            raise data.damaged(f"`{name}` comes twice")
        tensors[name] = data.tensor(name)
    for _ in range(data.number("<I")):
        alias, name = data.text(), data.text()
        if name not in tensors or alias in tensors:
            raise data.damaged(f"`{alias}` stands for `{name}`")
        tensors[alias] = tensors[name]
    data.require_end()
    return tensors


class _Bytes:
    """A file read from its start."""

    def __init__(self, file: Path) -> None:
        self._file, self._data, self._place = file, file.read_bytes(), 0

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"`{self._file.name}` is damaged", why=why, at=str(self._file))

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > len(self._data) - self._place:
            raise self.damaged(f"{n_bytes} bytes are said to follow at {self._place}, it has {len(self._data)}")
        self._place += n_bytes
        return self._data[self._place - n_bytes : self._place]

    def number(self, form: str) -> int:
        (found,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(found)

    def text(self) -> str:
        try:
            return self.take(self.number("<H")).rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise self.damaged("a name is not text") from error

    def tensor(self, name: str) -> np.ndarray:
        import numpy as np

        rank = self.number("<B")
        if rank > _MOST_RANK:
            raise self.damaged(f"`{name}` has {rank} dimensions")
        shape = [self.number("<I") for _ in range(rank)]
        code, n_bytes = self.number("<B"), self.number("<I")
        if code not in _TYPES:
            raise self.damaged(f"`{name}` is of type {code}, known are {', '.join(map(str, _TYPES))}")
        dtype = np.dtype(_TYPES[code])
        if n_bytes != math.prod(shape) * dtype.itemsize:
            raise self.damaged(f"`{name}` has {n_bytes} bytes and the shape {shape}")
        return np.frombuffer(self.take(n_bytes), dtype).reshape(shape).copy()

    def require_end(self) -> None:
        if self._place != len(self._data):
            raise self.damaged(f"{len(self._data) - self._place} bytes follow the last name")
