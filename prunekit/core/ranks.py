"""Several processes at one piece of work, as torchrun or `accelerate launch` starts them.

What a rank computes does not depend on how many there are, and figures of all ranks are put together in one fixed
order, so one rank and N give the same result. Nothing is unpickled: what ranks tell each other are tensors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import PrunekitError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
# The first rank measures and exports alone while the others wait; one that is gone is noticed at once all the same.
_LONGEST_WAIT = timedelta(days=2)
_FAILED, _TOLD = "prunekit/failed", "prunekit/told"
# How long the rank that holds the store stays after a failure, for the others to learn the exit code.
_FAREWELL = timedelta(seconds=30)
# How often a waiting rank looks whether another one failed, in seconds.
_LOOK_S = 0.002


def started() -> int:
    """Processes that the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process writes and prints; of several the first does."""
    return int(os.environ.get("RANK", "0")) == 0


def require_one_process(section: str) -> None:
    """Fails where a part of a recipe cannot be shared.

    Args:
        section: what it is called in the recipe.
    Raises:
        UsageError: if torchrun or accelerate started more than one process.
    """
    if started() > 1:
        raise UsageError(
            f"a recipe with `{section}` runs in one process",
            why=f"{started()} were started",
            hint="prune without `heal` first, then start `prunekit heal` on many" if section == "heal" else "",
        )


def place(device: str) -> str:
    """The device of this process, of a kind: `cuda` is `cuda:1` for the second process of a host."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


@dataclass(frozen=True)
class Ranks:
    """This process among its siblings.

    Args:
        rank: its number.
        size: how many there are.
        store: small texts that all of them read; None for one process, or where a library made the group.
    """

    rank: int = 0
    size: int = 1
    store: Any = None

    @property
    def first(self) -> bool:
        """Whether this rank writes results."""
        return self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether work item `number` is this rank's."""
        return number % self.size == self.rank

    def wait(self) -> None:
        """Returns once every rank has come here."""
        self.gather({})

    def gather(self, parts: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """What every rank gives, by rank; all ranks must call it together.

        Args:
            parts: tensors by name, each rank's own names and shapes.
        Returns:
            On the CPU, the same in all ranks bit for bit.
        Raises:
            PrunekitError: if another rank is gone.
        """
        held = {name: value.detach().cpu().contiguous() for name, value in parts.items()}
        if self.size == 1:
            return [held]
        import torch
        import torch.distributed as dist
        from safetensors.torch import load, save

        mine = torch.frombuffer(bytearray(save(held)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _together():
            self._finish(dist.all_gather(sizes, torch.tensor([mine.numel()]), async_op=True))
            longest = max(int(size) for size in sizes)
            found = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
            self._finish(
                dist.all_gather(found, torch.nn.functional.pad(mine, (0, longest - mine.numel())), async_op=True)
            )
        return [load(bytes(part[: int(size)].numpy())) for part, size in zip(found, sizes, strict=True)]

    def _finish(self, work: Any) -> None:
        """Waits for an exchange, but not for a rank that has said it failed."""
        while not work.is_completed():
            if self.store is not None and self.store.check([_FAILED]):
                raise RuntimeError("it failed")
            time.sleep(_LOOK_S)
        work.wait()

    def of_first(self, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What the first rank makes, in all ranks: for what is measured, drawn or slow and small."""
        return self.gather(make() if self.first else {})[0]

    def failed(self, exit_code: int) -> int | None:
        """Tells the other ranks that this one cannot go on.

        Returns:
            None for the first to fail, which says why; for the others its exit code.
        """
        if self.store is None:
            return None
        told = f"{self.rank} {exit_code}"
        try:
            first = self.store.compare_set(_FAILED, "", told).decode()
        except RuntimeError:
            # The rank that held the store ended first, and has said why.
            return 1
        return None if first == told else int(first.split()[1])

    def run_name(self) -> str:
        """A name for unfinished files that all ranks of this run share, and no other run has."""
        if self.size == 1:
            return str(os.getpid())
        return f"{os.environ['MASTER_ADDR']}-{os.environ['MASTER_PORT']}".replace("/", "-")


ALONE = Ranks()
# The ranks of this run while it lasts.
_run: list[Ranks] = []


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this run: what the launcher started, or this process alone. May be nested.

    Raises:
        PrunekitError: if the processes cannot find each other.
    """
    if started() == 1:
        yield Ranks()
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        yield _run[-1] if _run else Ranks(dist.get_rank(), dist.get_world_size())
        return
    try:
        store, rank, size = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        group = dist.PrefixStore("prunekit", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=_LONGEST_WAIT)
    except (ValueError, RuntimeError) as error:
        raise PrunekitError(
            "the processes of this run cannot find each other",
            why=str(error).partition("\n")[0],
            hint="start them by torchrun or accelerate launch",
        ) from error
    _run.append(Ranks(rank, size, store))
    try:
        yield _run[-1]
    finally:
        _run.pop()
        # An exchange that another rank will never join ends when that rank's process does.
        with suppress(RuntimeError):
            _say_farewell(store, rank, size)
        dist.destroy_process_group()


def _say_farewell(store: Any, rank: int, size: int) -> None:
    """Keeps the store alive until every rank has read how the run failed; torchrun holds it itself."""
    if not store.check([_FAILED]) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    if store.add(_TOLD, 1) == size:
        store.set(f"{_TOLD}/all", "")
    if rank == 0:
        store.wait([f"{_TOLD}/all"], _FAREWELL)


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PrunekitError(
            "another process of this run is gone",
            why=str(error).partition("\n")[0],
            hint="the launcher's output tells how it ended; run the same command again",
        ) from error


@contextmanager
def alone() -> Iterator[None]:
    """Hides the launcher from Trainer, which would average the gradients of ranks that train different models."""
    held = {name: os.environ.pop(name) for name in _LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)
