"""Writes weights as safetensors shards; bytes that stay as they are go from file to file past this process."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.checkpoint.reader import INDEX, ITEM_BYTES, SINGLE, torch_dtypes
from prunekit.core.errors import CheckpointError, SurgeryError
from prunekit.core.files import write_json
from prunekit.core.progress import NULL_PROGRESS, Progress

if TYPE_CHECKING:
    from torch import Tensor

_AT_ONCE = 64 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the kernel answers where a way of copying does not work between two files; the next way is tried.
_NOT_THIS_WAY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTSOCK)
Advance = Callable[[float], None]


@dataclass(frozen=True)
class Stored:
    """Bytes that lie in a file.

    Args:
        file: only read.
        start: first byte.
    """

    file: Path
    start: int


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write.

    Args:
        name: in the new checkpoint.
        dtype: code of the safetensors format, such as `BF16`.
        shape: its dimensions.
        content: where its bytes lie, or a function that makes them, as tensors whose values follow each other.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Stored | Callable[[], Iterable[Tensor]]

    @property
    def n_bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class _Run:
    """Neighbours in a source file that are neighbours in the shard too."""

    content: Stored
    n_bytes: int


def write_weights(
    folder: Path, tensors: Sequence[OutTensor], max_shard_bytes: int, progress: Progress = NULL_PROGRESS
) -> tuple[str, ...]:
    """Writes `model.safetensors`, or shards and their index, and returns the names of the weight files.

    Memory holds one tensor of one `content` function at a time.

    Args:
        folder: an existing folder without weights.
        tensors: in the order they shall lie in; wider types come first within a file, so that all are aligned.
        max_shard_bytes: most bytes of a file; a tensor that is larger has a file of its own.
        progress: told of bytes.
    Raises:
        SurgeryError: if the disk is too small or cannot be written to, or a made tensor is not what was announced.
        CheckpointError: if a source file has changed.
    """
    _require_new_names(tensors)
    shards = _shards(tensors, max_shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    headers = [_header(shard) for shard in shards]
    total = sum(tensor.n_bytes for tensor in tensors)
    _require_space(folder, total + sum(map(len, headers)))
    with progress.task("writing", total=total, unit="bytes") as task, disk_errors(folder):
        for name, header, shard in zip(names, headers, shards, strict=True):
            _write_shard(folder / name, header, shard, task.advance)
        if len(shards) > 1:
            where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    return tuple(names)


def _require_new_names(tensors: Sequence[OutTensor]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise SurgeryError(f"two tensors would be called `{tensor.name}`")
        seen.add(tensor.name)


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        why = f"the weights take {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise SurgeryError("the disk is too small", why=why, hint="make room, or write to another disk", at=str(folder))


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns what the disk answers while a folder is written into an error that names the folder.

    Raises:
        SurgeryError: for any OSError inside.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        where = f": {error.filename}" if error.filename else ""
        raise SurgeryError(
            "the disk is full" if full else "the model cannot be written",
            why=(error.strerror or str(error)) + where,
            hint="make room, or write to another disk" if full else "",
            at=str(folder),
        ) from error


def _shard_name(number: int, of: int) -> str:
    return f"model-{number:05d}-of-{of:05d}.safetensors"


def _shards(tensors: Sequence[OutTensor], max_bytes: int) -> list[list[OutTensor]]:
    """As many tensors to a file as fit with their header, in order, at least one file."""
    shards: list[list[OutTensor]] = [[]]
    room = max_bytes - len(_header([]))
    for tensor in tensors:
        # A table of its own for each tensor is more than it takes, which leaves room for offsets of more digits.
        needed = tensor.n_bytes + len(_header([tensor]))
        if shards[-1] and needed > room:
            shards.append([])
            room = max_bytes - len(_header([]))
        shards[-1].append(tensor)
        room -= needed
    # Stable: neighbours in the source stay neighbours.
    return [sorted(shard, key=lambda tensor: -ITEM_BYTES[tensor.dtype]) for shard in shards]


def _header(shard: Sequence[OutTensor]) -> bytes:
    """Length and table of a file, padded so that values begin at a multiple of eight bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + tensor.n_bytes
        table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shard(path: Path, header: bytes, shard: Sequence[OutTensor], advance: Advance) -> None:
    with ExitStack() as stack:
        target = stack.enter_context(path.open("xb", buffering=0)).fileno()
        _write_all(target, memoryview(header))
        sources: dict[Path, int] = {}
        for part in _runs(shard):
            if isinstance(part, OutTensor):
                _write_made(target, part, advance)
                continue
            file = part.content.file
            if file not in sources:
                sources[file] = stack.enter_context(_opened(file)).fileno()
            _copy(sources[file], part.content.start, target, part.n_bytes, file, advance)


@contextmanager
def _opened(file: Path) -> Iterator[io.FileIO]:
    try:
        opened = file.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(
            f"`{file.name}` cannot be read", why=error.strerror or str(error), at=str(file)
        ) from error
    with opened:
        yield opened


def _runs(shard: Sequence[OutTensor]) -> Iterator[_Run | OutTensor]:
    """Made tensors, and stored ones merged with their neighbours."""
    run: _Run | None = None
    for tensor in shard:
        content = tensor.content
        if isinstance(content, Stored) and run is not None and _follows(run, content):
            run = _Run(run.content, run.n_bytes + tensor.n_bytes)
            continue
        if run is not None:
            yield run
        run = _Run(content, tensor.n_bytes) if isinstance(content, Stored) else None
        if run is None:
            yield tensor
    if run is not None:
        yield run


def _follows(run: _Run, content: Stored) -> bool:
    return content == Stored(run.content.file, run.content.start + run.n_bytes)


def _write_made(target: int, tensor: OutTensor, advance: Advance) -> None:
    import torch

    if isinstance(tensor.content, Stored):
        return
    left = tensor.n_bytes
    for part in tensor.content():
        if part.dtype != torch_dtypes().get(tensor.dtype) or part.nbytes > left:
            left = -1
            break
        left -= part.nbytes
        _write_all(target, memoryview(part.contiguous().reshape(-1).view(torch.uint8).numpy()))
        advance(part.nbytes)
    if left:
        raise SurgeryError(f"`{tensor.name}` did not become {list(tensor.shape)} of {tensor.dtype}")


def _write_all(target: int, data: memoryview) -> None:
    while data:
        data = data[os.write(target, data[:_AT_ONCE]) :]


def _copy(source: int, start: int, target: int, n_bytes: int, file: Path, advance: Advance) -> None:
    """Copies a range to where the target stands, by the fastest way that works between the two files."""
    ways = _ways()
    done = 0
    while done < n_bytes:
        try:
            got = ways[0](source, target, start + done, min(n_bytes - done, _AT_ONCE))
        except OSError as error:
            if error.errno not in _NOT_THIS_WAY or len(ways) == 1:
                raise
            got = 0
        if got == 0 and len(ways) == 1:
            raise CheckpointError(f"`{file.name}` ends too early", why="it changed after it was opened", at=str(file))
        # Some file systems answer 0 instead of an error where they cannot copy this way.
        ways = ways if got else ways[1:]
        done += got
        advance(got)


Way = Callable[[int, int, int, int], int]


def _ways() -> list[Way]:
    ways: list[Way] = []
    if hasattr(os, "copy_file_range"):
        ways.append(lambda source, target, start, count: os.copy_file_range(source, target, count, start))
    if hasattr(os, "sendfile"):
        ways.append(lambda source, target, start, count: os.sendfile(target, source, start, count))
    return [*ways, _through_memory]


def _through_memory(source: int, target: int, start: int, count: int) -> int:
    data = os.pread(source, min(count, 8 << 20), start)
    _write_all(target, memoryview(data))
    return len(data)
