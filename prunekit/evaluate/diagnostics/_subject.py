"""The model that diagnostics look at, one sequence and one sub-layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from prunekit.core.errors import EvaluationError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.registry import Registry
from prunekit.core.types import Panel
from prunekit.modeling.modeling_prunekit import blocks_of

if TYPE_CHECKING:
    from prunekit.calibrate.stack import Stack

DIAGNOSTICS = Registry("diagnostic", "prunekit.evaluate.diagnostics")


class Diagnostic(Protocol):
    """A measurement over the depth of a model. The class also carries `source` and `differs` as text."""

    def measure(self, subject: Subject, progress: Progress = NULL_PROGRESS) -> tuple[Panel, ...]:
        """The measurement; none where it makes no sense for the model."""


@dataclass(frozen=True)
class Visit:
    """One sub-layer on one sequence, padding taken out.

    Args:
        address: of the sub-layer.
        before: hidden states that enter it, float32 [tokens, hidden].
        after: hidden states that leave it, the residual sum included.
        attention: weights of every query head, float32 [heads, queries, keys], rows sum to 1; None for an FFN.
    """

    address: str
    before: Tensor
    after: Tensor
    attention: Tensor | None


@dataclass(frozen=True)
class Subject:
    """A model and what it is run on.

    Args:
        stack: the model; its attention is switched to the form that shows its weights.
        inputs: the model's inputs by name, sequences first.
        decoder: whether the model reads text from left to right and predicts the next token.
        seed: for what a diagnostic draws at random.
    """

    stack: Stack
    inputs: Mapping[str, Tensor]
    decoder: bool
    seed: int = 0

    @property
    def sequences(self) -> int:
        """Sequences in the inputs."""
        return next(iter(self.inputs.values())).shape[0]

    @property
    def attention_addresses(self) -> tuple[str, ...]:
        """Attention sub-layers that the model has."""
        return tuple(address for address in self.stack.addresses if address.endswith(".attention"))

    def visits(self, inputs: Mapping[str, Tensor] | None = None) -> Iterator[Visit]:
        """Every sub-layer of every sequence, sequence by sequence; memory holds one map of attention at a time.

        Args:
            inputs: instead of the subject's own.
        """
        given = self.inputs if inputs is None else inputs
        stack = self.stack
        stack.model.set_attn_implementation("eager")
        with _watched(stack.model) as seen:
            for row in range(next(iter(given.values())).shape[0]):
                state = stack.enter({name: value[row : row + 1] for name, value in given.items()})
                hidden, real = state.hidden, slice(None) if state.mask is None else state.mask[0]
                for i, address in enumerate(stack.addresses):
                    seen.clear()
                    before, hidden = hidden, stack.run(i, hidden, state)
                    attention = _one(seen, address)[0, :, real][:, :, real] if address.endswith("attention") else None
                    yield Visit(address, before[0, real].float(), hidden[0, real].float(), attention)


@contextmanager
def _watched(model: Any) -> Iterator[list[Tensor]]:
    """The attention weights that modules inside the blocks return while they run."""
    seen: list[Tensor] = []

    def look(module: torch.nn.Module, given: Any, found: Any) -> None:
        for part in found[1:2] if isinstance(found, tuple) else ():
            if isinstance(part, Tensor) and part.dim() == 4:
                seen.append(part.float())

    with ExitStack() as hooks:
        for block in blocks_of(model):
            for module in block.modules():
                if module is not block:
                    hooks.callback(module.register_forward_hook(look).remove)
        yield seen


def _one(seen: list[Tensor], address: str) -> Tensor:
    if not seen:
        raise EvaluationError(f"`{address}` does not show its attention weights", why="its family has no eager form")
    return seen[0]


class HeadMeans:
    """A running mean for each head of each attention sub-layer."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, address: str, values: Tensor) -> None:
        """Takes in one sequence.

        Args:
            address: of the attention sub-layer.
            values: float [heads].
        """
        wide = values.double().cpu()
        self._sums[address] = self._sums[address] + wide if address in self._sums else wide
        self._counts[address] = self._counts.get(address, 0) + 1

    def panel(self, name: str, title: str, unit: str = "", threshold: float | None = None) -> Panel:
        """The means as a panel; sub-layers with fewer heads than others have None at the end."""
        means = {address: (total / self._counts[address]).tolist() for address, total in self._sums.items()}
        heads = max((len(row) for row in means.values()), default=0)
        values = tuple(tuple(row) + (None,) * (heads - len(row)) for row in means.values())
        return Panel(name, title, unit, "heads", tuple(means), tuple(map(str, range(heads))), values, threshold)
