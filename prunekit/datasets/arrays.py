"""Arrays on disk that the ranks of a run fill together and read a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from prunekit.core.ranks import Ranks


def shared_array(
    file: Path, shape: tuple[int, ...], fill: Callable[[np.memmap], None], ranks: Ranks, dtype: str = "float32"
) -> Path:
    """A .npy file that all ranks fill together; it appears whole or not at all.

    Args:
        file: where; kept as it is when it exists.
        shape: of the array.
        fill: writes this rank's part.
    Returns:
        `file`.
    """
    # Before anyone may make it, so that all ranks answer alike.
    there = file.is_file()
    ranks.wait()
    if there:
        return file
    part = file.with_name(f".{file.name}.{ranks.run_name()}.part")
    try:
        if ranks.first:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(part, "w+", dtype, shape).flush()
        ranks.wait()
        array = np.lib.format.open_memmap(part, "r+")
        fill(array)
        array.flush()
        ranks.wait()
        if ranks.first:
            part.replace(file)
        ranks.wait()
    finally:
        if ranks.first:
            part.unlink(missing_ok=True)
    return file


def read_rows(file: Path, rows: int = 4096) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of an array file along its first axis, read into memory one at a time.

    Not a memory map: its pages would count as this process's memory until the system takes them back.
    """
    with file.open("rb") as opened:
        version = np.lib.format.read_magic(opened)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(opened)
        width = int(np.prod(shape[1:], dtype=np.int64))
        for first in range(0, shape[0], rows):
            n = min(rows, shape[0] - first)
            yield first, np.fromfile(opened, dtype, n * width).reshape(n, *shape[1:])
