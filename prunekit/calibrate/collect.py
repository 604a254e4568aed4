"""One pass over calibration data that feeds every statistic asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.ranks import ALONE, Ranks
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

    def sums(self) -> dict[str, Tensor]:
        """What it has seen, on the CPU; what two observers saw on other data adds up by key."""

    def merge(self, sums: Mapping[str, Tensor]) -> None:
        """Takes in the sums of another observer of this class."""

    def value(self) -> dict[str, Tensor]:
        """The statistic by key; keys begin with the observer's registry name and a slash."""


def collect(
    stack: Stack,
    batch: Tensor | Mapping[str, Tensor],
    needs: Iterable[str],
    progress: Progress = NULL_PROGRESS,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Statistics of a model on a batch, all from one pass.

    Args:
        stack: the model, run sub-layer by sub-layer.
        batch: token ids int64 [sequences, tokens], or the model's inputs by name, sequences first.
        needs: names of observers, as the `needs` of scores list them. Repeats count once; none gives an empty result
            without running the model.
        progress: shown as sequences.
        ranks: processes that share the sequences; all of them get the same, bit for bit that of one alone. Where
            weights stay in files, a rank runs its whole share at once, so that each weight is read once.
    Returns:
        Float32 statistics on the CPU, by the keys that the observers document.
    """
    observers: dict[str, Observer] = {name: OBSERVERS.get(name)() for name in dict.fromkeys(needs)}
    if not observers:
        return {}
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    sequences = next(iter(inputs.values())).shape[0]
    width = -(-sequences // ranks.size) if stack.offloaded else 1
    with torch.no_grad(), progress.task("calibrating", total=sequences, unit="sequences") as task:
        for first in range(0, sequences, ranks.size * width):
            row = first + ranks.rank * width
            mine = {name: value[row : row + width] for name, value in inputs.items()}
            # In the order of the sequences, whoever ran them: sums of floats depend on it.
            for part in ranks.gather(_seen(stack, mine, tuple(observers)) if row < sequences else {}):
                for name, observer in observers.items():
                    begin = f"{name}/"
                    observer.merge({k.removeprefix(begin): v for k, v in part.items() if k.startswith(begin)})
            task.advance(min(ranks.size * width, sequences - first))
    return {key: value for observer in observers.values() for key, value in observer.value().items()}


def _seen(stack: Stack, part: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Sums of fresh observers over some inputs, by name of the observer and key."""
    observers: dict[str, Observer] = {name: OBSERVERS.get(name)() for name in names}
    _feed(stack, part, observers.values())
    return {f"{name}/{key}": value for name, observer in observers.items() for key, value in observer.sums().items()}


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
