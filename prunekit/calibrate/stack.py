"""A model as a row of sub-layers that run one at a time, on hidden states of the caller's choice."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunekit.core.errors import StructureError
from prunekit.modeling.modeling_prunekit import (
    blocks_of,
    has_output_projection,
    output_projection,
    present,
    skip,
    stacks_of,
)
from prunekit.modeling.offload import is_offloaded

KINDS = ("attention", "ffn")
# Relative to the largest logit: two orders of the same sums differ by 1e-6 in float32 and 1e-2 in bfloat16.
_PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_PROBE_TOKENS = 8
# Blocks that return a tuple, the hidden states first.
_TUPLES = ("MPNetLayer",)
_PLAIN = (type(None), bool, int, float, str)

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    """The model's forward got to where it was wanted."""


@dataclass
class State:
    """What a pass needs besides hidden states.

    Args:
        hidden: what enters the first block [sequences, tokens, hidden].
        inputs: the model's inputs by name, on its device.
        calls: for every block, the other arguments that the model gives it.
        mask: bool [sequences, tokens], False where the input is padding; None where nothing is.
    """

    hidden: Tensor
    inputs: dict[str, Tensor]
    calls: tuple[_Call, ...]
    mask: Tensor | None
    _doubled: tuple[_Call, ...] | None = field(default=None, repr=False)
    _repeated: dict[int, tuple[_Call, ...]] = field(default_factory=dict, repr=False)

    @property
    def sequences(self) -> int:
        """Sequences in the inputs."""
        return self.hidden.shape[0]


class Stack:
    """The sub-layers of a model in execution order; the model itself stays as it is.

    A sub-layer is its block with the other sub-layer bypassed, so pre-norm and post-norm blocks, masks, positions and
    windows are the model's own. Hidden states may hold several versions of the same sequences, one after the other
    in the first dimension, so that one call serves many candidates.

    Args:
        model: any loaded model whose blocks are known, in eval mode; stock or heterogeneous, any device and type.

    Raises:
        StructureError: if the sub-layers of a block do not run one after the other, or there are several stacks of
            blocks.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        if "" not in stacks_of(model):
            why = "it has several stacks of blocks: " + ", ".join(stacks_of(model))
            what = f"sub-layers of `{type(model).__name__}` cannot be run one at a time"
            raise StructureError(what, why=why, hint="use a score that needs no data, such as gardener or magnitude")
        self._blocks = tuple(blocks_of(model))
        if any(getattr(block, "use_parallel_residual", False) for block in self._blocks):
            raise StructureError(
                f"sub-layers of `{type(model).__name__}` cannot be run one at a time",
                why="attention and FFN of a block read the same stream (`use_parallel_residual`)",
                hint="use a score that needs no data, such as gardener or magnitude",
            )
        self._tuples = type(self._blocks[0]).__name__ in _TUPLES
        self._units = tuple((b, k) for b, block in enumerate(self._blocks) for k in KINDS if present(block, k))
        self._sublayers = tuple(_alone(self._blocks[number], kind) for number, kind in self._units)
        self.addresses: tuple[str, ...] = tuple(f"blocks.{block}.{kind}" for block, kind in self._units)
        taken = inspect.signature(model.forward).parameters
        self._accepted = frozenset(taken)
        # Models with a language model inside pass the argument on.
        passes_on = model.can_generate() and any(each.kind is each.VAR_KEYWORD for each in taken.values())
        self._no_cache = {"use_cache": False} if "use_cache" in taken or passes_on else {}
        self._found_way: str | None = None
        self.offloaded = is_offloaded(model)

    def enter(self, inputs: Mapping[str, Tensor]) -> State:
        """Runs what comes before the blocks.

        Args:
            inputs: the model's inputs by name, sequences first in each.
        """
        # Weights that stay in files have no place of their own; they are read into the CPU's memory.
        device = "cpu" if self.offloaded else self.model.device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        hidden, calls = self._before_blocks(inputs)
        mask = inputs.get("attention_mask")
        padded = mask is not None and mask.shape == hidden.shape[:2] and not bool(mask.bool().all())
        return State(hidden, inputs, calls, mask.bool() if padded and mask is not None else None)

    def run(self, i: int, hidden: Tensor, state: State) -> Tensor:
        """Sub-layer `addresses[i]`, its norm and the residual sum included.

        Args:
            hidden: [versions x sequences, tokens, hidden], all sequences of the first version first.
        """
        args, kwargs = self._calls(state, hidden.shape[0])[self._units[i][0]]
        with torch.no_grad():
            found: Tensor = self._sublayers[i](hidden, *args, **kwargs)
        return found[0] if self._tuples else found

    def projection(self, i: int) -> tuple[Tensor, Tensor | None]:
        """Weight [hidden, width] and bias [hidden] of the output projection of `addresses[i]`.

        Raises:
            StructureError: for an FFN with experts.
        """
        number, kind = self._units[i]
        try:
            layer: Any = output_projection(self._blocks[number], kind)
        except ValueError as error:
            raise StructureError(f"`{self.addresses[i]}` has no single output projection", why=str(error)) from error
        weight = layer.weight.detach()
        # transformers' Conv1D stores [in, out].
        return (weight.T if hasattr(layer, "nf") else weight), layer.bias

    @contextmanager
    def projections(self, seen: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
        """While open, runs of sub-layers tell what enters and leaves their output projection; FFNs with experts do not.

        Args:
            seen: called with the address, the heads' or neurons' outputs [rows, tokens, width], and what the projection
                makes of them [rows, tokens, hidden].
        """
        hooks = []
        for address, (number, kind) in zip(self.addresses, self._units, strict=True):

            def tell(module: Any, given: Any, found: Tensor, address: str = address) -> None:
                seen(address, given[0], found)

            if has_output_projection(self._blocks[number], kind):
                hooks.append(output_projection(self._blocks[number], kind).register_forward_hook(tell))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def projecting(self, i: int, channels: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
        """While open, the output projection of `addresses[i]` is another one, on some channels of its input.

        Args:
            channels: int64 [width].
            weight: [hidden, width].
            bias: [hidden], or None.
        """
        number, kind = self._units[i]

        def replaced(module: Any, given: Any, found: Tensor) -> Tensor:
            x = given[0][..., channels.to(found.device)]
            return torch.nn.functional.linear(x, weight.to(found), None if bias is None else bias.to(found))

        hook = output_projection(self._blocks[number], kind).register_forward_hook(replaced)
        try:
            yield
        finally:
            hook.remove()

    def finish(self, hidden: Tensor, state: State) -> Tensor:
        """The model's own end on what leaves the last block: logits, or the last hidden state of a model without them.

        Args:
            hidden: as for `run`.
        """
        return self._end(hidden, self._inputs(state, hidden.shape[0]))

    def features(self, hidden: Tensor, state: State) -> Tensor:
        """What `pieces` takes: what the head reads, or the output itself, or `hidden` where only the whole end will do.

        Args:
            hidden: as for `run`.
        """
        way = self._way(state)
        if way == "whole":
            return hidden
        inputs = self._inputs(state, hidden.shape[0])
        return self._end(hidden, inputs) if way == "output" else self._head_input(hidden, inputs)

    def head(self, features: Tensor) -> Tensor:
        """Logits of any positions [..., hidden]; only where `splits` is true."""
        with torch.no_grad():
            logits: Tensor = self.model.get_output_embeddings()(features)
        return logits

    def has_logits(self, state: State) -> bool:
        """Whether the model gives logits; hidden states otherwise."""
        inputs = {name: value[:1] for name, value in state.inputs.items()}
        few = {"logits_to_keep": 1} if "logits_to_keep" in self._accepted else {}
        return getattr(self._forward(inputs, self._passing(state.hidden[:1]), **few), "logits", None) is not None

    def shape(self, i: int) -> tuple[Any, ...]:
        """Equal for sub-layers that take equally long: the kind, and the shapes of the block's parameters."""
        number, kind = self._units[i]
        return kind, tuple(tuple(parameter.shape) for parameter in self._blocks[number].parameters())

    def splits(self, state: State) -> bool:
        """Whether the head alone, on what it reads, gives the model's own logits: no soft cap, no scale after it."""
        return self._way(state) == "head"

    def pieces(self, features: Tensor, state: State, max_bytes: int) -> Iterator[Tensor]:
        """Outputs at every position that is not padding, a few positions at a time.

        Args:
            features: of one version, as `features` gives them.
            max_bytes: what a piece may take in float32; a single position always goes.
        Returns:
            Pieces [positions, width] in the order of the positions; a model with one output a sequence has one
            position a sequence.
        """
        way = self._way(state)
        if way == "whole":
            yield from self._whole_pieces(features, state, max_bytes)
            return
        if features.dim() == 2:
            flat = features
        else:
            flat = features.flatten(0, 1) if state.mask is None else features[state.mask]
        for part in flat.split(self._rows(max_bytes, flat.shape[-1])):
            yield self.head(part) if way == "head" else part

    def _whole_pieces(self, hidden: Tensor, state: State, max_bytes: int) -> Iterator[Tensor]:
        """The model's own end a sequence at a time, and a few positions at a time where the model can do that."""
        few = "logits_to_keep" in self._accepted
        for row in range(state.sequences):
            inputs = {name: value[row : row + 1] for name, value in state.inputs.items()}
            positions = torch.arange(hidden.shape[1], device=hidden.device)
            if state.mask is not None:
                positions = positions[state.mask[row]]
            if not few:
                yield self._end(hidden[row : row + 1], inputs)[0, positions]
                continue
            for part in positions.split(self._rows(max_bytes, hidden.shape[-1])):
                yield self._end(hidden[row : row + 1], inputs, logits_to_keep=part)[0]

    def _rows(self, max_bytes: int, width: int) -> int:
        head = self.model.get_output_embeddings()
        return max(1, max_bytes // (4 * (width if head is None else head.weight.shape[0])))

    def _way(self, state: State) -> str:
        """How outputs come about: by the `head` alone, as the `output` of a model without one, by the `whole` end."""
        if self._found_way is None:
            head = self.model.get_output_embeddings()
            self._found_way = "output" if head is None else "head" if self._probe(head, state) else "whole"
        return self._found_way

    def _probe(self, head: torch.nn.Module, state: State) -> bool:
        hidden, inputs = state.hidden[:1], {name: value[:1] for name, value in state.inputs.items()}
        few = torch.arange(min(_PROBE_TOKENS, hidden.shape[1]), device=hidden.device)
        if "logits_to_keep" in self._accepted:
            expected = self._end(hidden, inputs, logits_to_keep=few).float()
        else:
            expected = self._end(hidden, inputs)[:, few].float()
        found = self.head(self._head_input(hidden, inputs)[:, few]).float()
        tolerance = _PROBE_TOLERANCE.get(head.weight.dtype, 2e-2) * float(expected.abs().max())
        return found.shape == expected.shape and float((found - expected).abs().max()) <= tolerance

    def _before_blocks(self, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[_Call, ...]]:
        entered: list[Tensor] = []
        calls: list[_Call] = []

        def record(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            entered.append(hidden)
            calls.append((rest, kwargs))
            if len(calls) == len(self._blocks):
                raise _Reached
            return self._returned(hidden)

        with _replaced(dict.fromkeys(self._blocks, record)):
            self._forward(inputs)
        if len(calls) != len(self._blocks):
            raise StructureError(
                f"`{type(self.model).__name__}` ran {len(calls)} of its {len(self._blocks)} blocks",
                why="sub-layers are run one at a time, so every block must run once",
            )
        return entered[0], tuple(calls)

    def _end(self, hidden: Tensor, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        found = self._forward(inputs, self._passing(hidden), **options)
        logits = getattr(found, "logits", None)
        return found.last_hidden_state if logits is None else logits

    def _head_input(self, hidden: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        read: list[Tensor] = []

        def record(features: Tensor) -> None:
            read.append(features)
            raise _Reached

        head = self.model.get_output_embeddings()
        self._forward(inputs, {**self._passing(hidden), head: record})
        if not read:
            raise StructureError(f"`{type(self.model).__name__}` does not call its output embeddings")
        return read[0]

    def _passing(self, hidden: Tensor) -> dict[torch.nn.Module, Callable[..., Any]]:
        """Blocks that do nothing, but the last gives `hidden`, whatever comes in."""
        return dict.fromkeys(self._blocks, lambda *args, **kwargs: self._returned(hidden))

    def _returned(self, hidden: Tensor) -> Tensor | tuple[Tensor]:
        """Hidden states as a block returns them."""
        return (hidden,) if self._tuples else hidden

    def _forward(
        self,
        inputs: dict[str, Tensor],
        replaced: Mapping[torch.nn.Module, Callable[..., Any]] | None = None,
        **options: Any,
    ) -> Any:
        options |= {**self._no_cache, "return_dict": True}
        with torch.no_grad(), _replaced(replaced or {}):
            try:
                return self.model(**inputs, **options)
            except _Reached:
                return None

    def _inputs(self, state: State, rows: int) -> dict[str, Tensor]:
        versions = _versions(state, rows)
        if versions == 1:
            return state.inputs
        return {name: _times(value, versions) for name, value in state.inputs.items()}

    def _calls(self, state: State, rows: int) -> tuple[_Call, ...]:
        """The blocks' other arguments for so many rows of hidden states."""
        versions = _versions(state, rows)
        if versions == 1:
            return state.calls
        if versions not in state._repeated:
            # Two passes that differ in nothing but the number of sequences tell which arguments grow with it.
            if state._doubled is None:
                state._doubled = self._before_blocks(self._inputs(state, 2 * state.sequences))[1]
            known: dict[int, Any] = {}
            state._repeated.clear()
            state._repeated[versions] = _repeat(state.calls, state._doubled, versions, known)
        return state._repeated[versions]


def _versions(state: State, rows: int) -> int:
    if rows % state.sequences:
        raise ValueError(f"{rows} rows of hidden states are no multiple of {state.sequences} sequences")
    return rows // state.sequences


def _repeat(value: Any, doubled: Any, times: int, known: dict[int, Any]) -> Any:
    """`value` for several versions of the sequences; `doubled` is the same for two. Shared tensors stay shared."""
    if isinstance(value, Tensor):
        if value.shape == doubled.shape:
            return value
        if id(value) not in known:
            known[id(value)] = _times(value, times)
        return known[id(value)]
    if isinstance(value, dict):
        return {key: _repeat(part, doubled[key], times, known) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_repeat(part, other, times, known) for part, other in zip(value, doubled, strict=True))
    if isinstance(value, _PLAIN):
        return value
    raise StructureError(f"a block gets a `{type(value).__name__}`", why="it cannot be repeated for several candidates")


def _times(value: Tensor, times: int) -> Tensor:
    return value.repeat(times, *[1] * (value.dim() - 1))


def _alone(block: torch.nn.Module, kind: str) -> torch.nn.Module:
    """The block with no sub-layer but one: it shares parameters with the block, which stays whole."""
    alone = copy.copy(block)
    # A copied module shares the dictionary of its parts, and bypassing replaces parts.
    alone.__dict__["_modules"] = dict(block._modules)
    # Where weights stay in files, accelerate has hung up a forward that is bound to the whole block.
    alone.__dict__.pop("forward", None)
    other = KINDS[1 - KINDS.index(kind)]
    if present(alone, other):
        skip(alone, other)
    return alone


@contextmanager
def _replaced(forwards: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules that run something else for a while."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward
