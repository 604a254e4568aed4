"""Several processes at one data set: `torchrun --nproc-per-node N -m prunekit.cli.main data score ...`.

Ranks share the cache folder: each writes what it made to files there and waits for the others. What a rank computes
does not depend on how many there are, so one rank and N give the same scores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among its siblings."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes results."""
        return self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether work item `number` is this rank's."""
        return number % self.size == self.rank

    def wait(self) -> None:
        """Returns once every rank has come here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def run_name(self) -> str:
        """A name for unfinished files that all ranks of this run share, and no other run has."""
        if self.size == 1:
            return str(os.getpid())
        return f"{os.environ['MASTER_ADDR']}-{os.environ['MASTER_PORT']}".replace("/", "-")


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this run: what torchrun started, or this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        if started:
            dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Hides the launcher from Trainer, which would average the gradients of ranks that train different models."""
    held = {name: os.environ.pop(name) for name in _LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


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
