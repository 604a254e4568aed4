"""What a checkpoint is made of: tensors, sub-layers, blocks, and groups of units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from prunekit.structure.architecture import Layout, SublayerKind
from prunekit.structure.packed import Packed

Role = Literal["attention", "ffn"]
# Width kinds: the role of the sub-layers they narrow, and the axis that is cut.
WIDTHS: dict[str, tuple[Role, str]] = {
    "query_heads": ("attention", "rep"),
    "kv_groups": ("attention", "kv"),
    "neurons": ("ffn", "ffn"),
    "experts": ("ffn", "experts"),
}
# The kind that is one width of the whole model: channels of the residual stream.
HIDDEN = "hidden"
# Sizes of axes that every model gives alike: three parts of a fused projection, two halves of a gated one.
FUSED = {"part": 3, "half": 2}


def address_of(stack: str, number: int) -> str:
    """Address of a block by its number within its stack, "" in a model with one."""
    return f"{stack}.blocks.{number}" if stack else f"blocks.{number}"


@dataclass(frozen=True)
class TensorRef:
    """A tensor on disk.

    Args:
        name: in the checkpoint.
        dtype: code of the safetensors format.
        shape: its dimensions.
        layout: for each dimension the axes it factors into, outermost first: a query projection has
            `(("kv", "rep", "hd"), ("hidden",))`.
        expert: number of the expert that it belongs to, None for none.
        packed: the quantised matrix that it belongs to, None for none; its dimensions are then plain lengths.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: Layout
    expert: int | None = None
    packed: Packed | None = None

    @property
    def matrix(self) -> str:
        """Its name in a checkpoint that is not quantised."""
        return self.name if self.packed is None else self.packed.matrix


@dataclass(frozen=True)
class SubLayer:
    """An attention or the FFN of a block, with its norm.

    Args:
        address: `blocks.3.attention`, or `decoder.blocks.3.attention` in a model with several stacks.
        kind: `attention`, `cross_attention` or `ffn`.
        block: place of its block in the model's `blocks`.
        widths: attention: `kv` (KV groups), `rep` (query heads in each), `hd` (numbers a head); FFN: `ffn` (neurons,
            those of each expert where it has experts) and, with experts, `experts`.
        tensors: all of them.
    """

    address: str
    kind: SublayerKind
    block: int
    widths: dict[str, int]
    tensors: tuple[TensorRef, ...]

    @property
    def role(self) -> Role:
        """Which widths it has: those of an attention or those of an FFN."""
        return "ffn" if self.kind == "ffn" else "attention"


@dataclass(frozen=True)
class Block:
    """A block; None stands for a sub-layer that was removed earlier, or that no block of its stack has.

    Args:
        index: its place in the model's `blocks`.
        attention: over the stream itself.
        ffn: the FFN.
        cross_attention: over what an encoder gives.
        stack: name of its stack, "" in a model with one.
        number: within its stack, as in the names of its tensors; None where that is its index.
    """

    index: int
    attention: SubLayer | None
    ffn: SubLayer | None
    cross_attention: SubLayer | None = None
    stack: str = ""
    number: int | None = None

    @property
    def address(self) -> str:
        """`blocks.3`, or `decoder.blocks.3`."""
        return address_of(self.stack, self.index if self.number is None else self.number)

    @property
    def name(self) -> str:
        """What tables call it: `3`, or `decoder 3`."""
        return f"{self.stack} {self.number}" if self.stack else str(self.index)

    @property
    def sublayers(self) -> tuple[SubLayer, ...]:
        """The sub-layers it has, in execution order."""
        parts = (self.attention, self.cross_attention, self.ffn)
        return tuple(sublayer for sublayer in parts if sublayer is not None)


@dataclass(frozen=True)
class Group:
    """Units of one kind in one place, which compete with each other.

    Args:
        kind: `blocks`, `sublayers`, `attention`, `cross_attention`, `ffn`, `query_heads`, `kv_groups`, `neurons`,
            `experts` or `hidden`.
        address: the kind, or for widths the sub-layer and the kind: `blocks.3.ffn.neurons`.
        units: addresses of the units.
        members: tensors of each unit; for widths one entry, the tensors that all units share.
        axis: for widths the axis that a unit is one position of, else "".
        sizes: for widths the size of every axis in the members' layouts.
        output: for widths the matrix by which the units lead back to the residual stream.
    """

    kind: str
    address: str
    units: tuple[str, ...]
    members: tuple[tuple[TensorRef, ...], ...]
    axis: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    output: TensorRef | None = None
