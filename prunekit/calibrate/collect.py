"""One pass over calibration data that feeds every statistic asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.registry import Registry

if TYPE_CHECKING:
    from prunekit.calibrate.stack import Stack

OBSERVERS = Registry("observer", "prunekit.calibrate.observers")


class Observer(Protocol):
    """A running statistic of constant memory: what it holds does not grow with the number of tokens seen.

    Attributes:
        point: where it looks: at the `residual` stream around blocks and sub-layers, or at the output `projection` of
            each sub-layer.
    """

    point: ClassVar[Literal["residual", "projection"]]

    def update(self, address: str, before: Tensor, after: Tensor, mask: Tensor | None) -> None:
        """Takes in what one unit did for one batch.

        Args:
            address: `blocks.i.attention`, `blocks.i.ffn`, or `blocks.i` behind its sub-layers, which has no projection.
            before: what enters the unit [sequences, tokens, hidden], or its projection [sequences, tokens, width].
            after: what leaves it [sequences, tokens, hidden].
            mask: int64 or bool [sequences, tokens], 0 where the input is padding; None where nothing is.
        """

    def flush(self) -> None:
        """Ends a batch: every unit was updated once since the last flush."""

    def merge(self, other: Observer) -> None:
        """Takes in what another observer of this class saw on other data."""

    def value(self) -> dict[str, Tensor]:
        """The statistic by key; keys begin with the observer's registry name and a slash."""


def collect(
    stack: Stack,
    batch: Tensor | Mapping[str, Tensor],
    needs: Iterable[str],
    progress: Progress = NULL_PROGRESS,
    batch_size: int = 1,
) -> dict[str, Tensor]:
    """Statistics of a model on a batch, all from one pass.

    Args:
        stack: the model, run sub-layer by sub-layer.
        batch: token ids int64 [sequences, tokens], or the model's inputs by name, sequences first.
        needs: names of observers, as the `needs` of scores list them. Repeats count once; none gives an empty result
            without running the model.
        progress: shown as sequences.
        batch_size: sequences run at once; all of them where weights stay in files, so that each is read once.
    Returns:
        Float32 statistics on the CPU, by the keys that the observers document.
    """
    observers = observe(stack, batch, needs, progress, batch_size)
    return {key: value for observer in observers.values() for key, value in observer.value().items()}


def observe(
    stack: Stack,
    batch: Tensor | Mapping[str, Tensor],
    needs: Iterable[str],
    progress: Progress = NULL_PROGRESS,
    batch_size: int = 1,
) -> dict[str, Observer]:
    """The observers after the pass, by name, so that several shards of data can be merged; arguments as `collect`."""
    observers: dict[str, Observer] = {name: OBSERVERS.get(name)() for name in dict.fromkeys(needs)}
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    sequences = next(iter(inputs.values())).shape[0]
    if not observers:
        return observers
    batch_size = sequences if stack.offloaded else batch_size
    with torch.no_grad(), progress.task("calibrating", total=sequences, unit="sequences") as task:
        for first in range(0, sequences, batch_size):
            part = {name: value[first : first + batch_size] for name, value in inputs.items()}
            _feed(stack, part, observers.values())
            task.advance(min(batch_size, sequences - first))
    return observers


def _feed(stack: Stack, part: dict[str, Tensor], observers: Iterable[Observer]) -> None:
    observers = tuple(observers)
    outside = [observer for observer in observers if observer.point == "residual"]
    inside = [observer for observer in observers if observer.point == "projection"]
    mask = part.get("attention_mask")

    def seen(address: str, entering: Tensor, leaving: Tensor) -> None:
        for observer in inside:
            observer.update(address, entering, leaving, mask)

    state = stack.enter(part)
    hidden = entered = state.hidden
    blocks = [address.rpartition(".")[0] for address in stack.addresses]
    for i, address in enumerate(stack.addresses):
        if i == 0 or blocks[i] != blocks[i - 1]:
            entered = hidden
        before = hidden
        with stack.projections(seen) if inside else nullcontext():
            hidden = stack.run(i, hidden, state)
        for observer in outside:
            observer.update(address, before, hidden, mask)
        if i + 1 == len(blocks) or blocks[i + 1] != blocks[i]:
            for observer in outside:
                observer.update(blocks[i], entered, hidden, mask)
    for observer in observers:
        observer.flush()
