"""A checkpoint seen as blocks, sub-layers and groups of units, from its headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.errors import PlanError, StructureError
from prunekit.structure.architecture import (
    PREFIX,
    Architecture,
    HiddenRule,
    Layout,
    Norm,
    SublayerKind,
    architecture,
    dim_size,
)
from prunekit.structure.packed import Packed, Piece, literal, packed_pieces, quant_method
from prunekit.structure.shape import Shape, text_config

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
# Parts of heads that architecture files do not name one by one.
_HEADS = re.compile(r".*(?:predictions|decoder|lm_head|vocab_projector)\.(?:weight|bias)")
_PARTS = {"part": 3, "half": 2}
PACKED_HINT = "remove blocks or sub-layers, or cut the model before it is quantised"


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
        return _address(self.stack, self.index if self.number is None else self.number)

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


@dataclass(frozen=True)
class ModelView:
    """A checkpoint's structure.

    Args:
        checkpoint: the files.
        arch: its architecture.
        model_type: of the stock family, also for a heterogeneous folder.
        blocks: in execution order, those of an encoder before those of the decoder that reads it.
        outer: tensors outside blocks: embeddings, last norm, head.
        hidden: width of the residual stream.
        widths: what the configuration says of all attentions and FFNs, by kind (`dense_ffn`: those of blocks without
            experts in a model that has them), of several stacks by stack and kind: `decoder.ffn`; those of a
            heterogeneous folder may differ from it.
    """

    checkpoint: Checkpoint
    arch: Architecture
    model_type: str
    blocks: tuple[Block, ...]
    outer: tuple[TensorRef, ...]
    hidden: int
    widths: Mapping[str, Mapping[str, int]]

    @classmethod
    def open(cls, folder: Path) -> ModelView:
        """The structure of a folder; no weight is read.

        Raises:
            CheckpointError: if the files are damaged.
            StructureError: for an unknown architecture, a tensor that no part of it explains, or one of a wrong shape.
        """
        checkpoint = Checkpoint.open(folder)
        model_type = str(checkpoint.config.get("model_type", ""))
        arch = architecture(model_type)
        shapes = [Shape(checkpoint.config, part) for part in arch.each]
        held: list[dict[str, Piece | None]] = [{} for _ in shapes]
        outer = []
        lengths = {name: info.n_bytes for name, info in checkpoint.tensors.items()}
        pieces = packed_pieces(checkpoint.config, lengths, arch)
        for name in checkpoint.tensors:
            if arch.is_ignored(name):
                continue
            piece = pieces.get(name)
            matrix = piece.matrix if piece else name
            part = next((i for i, part in enumerate(arch.each) if part.split(matrix) is not None), None)
            if part is None:
                outer.append(_outer(checkpoint, arch, shapes[0], name, piece))
            else:
                held[part][name] = piece
        blocks: list[Block] = []
        for shape, names in zip(shapes, held, strict=True):
            blocks += _blocks(checkpoint, shape, names, len(blocks))
        usual = {
            f"{shape.arch.stack}.{kind}" if arch.stacks else kind: widths
            for shape in shapes
            for kind, widths in shape.usual().items()
        }
        own_type = model_type.removeprefix(PREFIX)
        return cls(checkpoint, arch, own_type, tuple(blocks), tuple(outer), shapes[0].hidden, usual)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration as stored; `architectures` names no head that the files do not hold."""
        config = self.checkpoint.config
        named = self.arch.classes(config, self.checkpoint.tensors)
        return {**config, "architectures": named} if named else config

    @property
    def heterogeneous(self) -> bool:
        """Whether prunekit wrote the folder with blocks that differ."""
        return str(self.config.get("model_type", "")).startswith(PREFIX)

    @property
    def section(self) -> str:
        """Key of the configuration's part that describes the blocks, "" where the whole does."""
        return self.arch.section if self.arch.section in self.config else ""

    @cached_property
    def text(self) -> dict[str, Any]:
        """The part of the configuration that describes the blocks."""
        return text_config(self.config, self.arch)

    @property
    def norm(self) -> Norm:
        """How sub-layers are normalised and summed, as in `Architecture`."""
        return self.arch.norm_of(self.text)

    def heads_of(self, block: int) -> list[int]:
        """Numbers that the heads of a block's attention have in the dense model.

        Args:
            block: its place in `blocks`; in a heterogeneous folder the numbers may have gaps.
        """
        layers = (self.config.get("prunekit") or {}).get("per_layer_config") or {}
        address = self.blocks[block].address
        named = {
            _address(stack, int(number)): layer
            for key, layer in layers.items()
            for stack, _, number in [str(key).rpartition(".")]
        }
        numbers = named.get(address, {}).get("kept_heads")
        return list(numbers or range(self.widths[self._kind_of(block, "attention")]["kv"]))

    def stack_of(self, block: int) -> Architecture:
        """What describes the stack of a block, by its place in `blocks`."""
        return next(part for part in self.arch.each if part.stack == self.blocks[block].stack)

    def _kind_of(self, block: int, kind: str) -> str:
        """Key of `widths` for a kind of sub-layer of a block."""
        stack = self.blocks[block].stack
        return f"{stack}.{kind}" if stack else kind

    @cached_property
    def sublayers(self) -> tuple[SubLayer, ...]:
        """All sub-layers in execution order."""
        return tuple(sublayer for block in self.blocks for sublayer in block.sublayers)

    @cached_property
    def _by_address(self) -> dict[str, SubLayer]:
        return {sublayer.address: sublayer for sublayer in self.sublayers}

    @property
    def head(self) -> TensorRef | None:
        """The matrix that makes logits, where it is stored: for tied embeddings the token embedding."""
        found = self._outer_like(self.arch.head)
        return found if found is not None or not self.tied else self._outer_like(self.arch.table)

    @property
    def tied(self) -> bool:
        """Whether a head shares the token embedding."""
        stored = self._outer_like(self.arch.head) is not None
        named = re.search(
            r"For(CausalLM|MaskedLM|ConditionalGeneration)|LMHead", " ".join(self.config.get("architectures") or ())
        )
        default = self.model_type in self.arch.tied
        said = self.config.get("tie_word_embeddings", self.text.get("tie_word_embeddings", default))
        return bool(not stored and named and said)

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding, 0 where there is none."""
        table = self._outer_like(self.arch.table)
        return table.shape[0] if table is not None and ("vocab",) in table.layout else 0

    def is_rows(self, ref: TensorRef) -> bool:
        """Whether the rows of a tensor outside blocks are those of the vocabulary."""
        if ("vocab",) in ref.layout:
            return ref.layout[0] == ("vocab",)
        return ref.shape[:1] == (self.vocabulary,) and _HEADS.fullmatch(ref.name) is not None

    def _outer_like(self, pattern: str) -> TensorRef | None:
        held = (ref for ref in self.outer if ref.packed is None or ref.packed.weights)
        return next((ref for ref in held if pattern and re.fullmatch(pattern, ref.matrix)), None)

    @cached_property
    def quantised(self) -> str:
        """By which method matrices are quantised, such as `gptq`; "" where none is."""
        parts = (ref for sublayer in self.sublayers for ref in sublayer.tensors)
        found = any(ref.packed is not None for ref in (*self.outer, *parts))
        return quant_method(self.config) if found else ""

    def require_plain(self, what: str) -> None:
        """Makes sure that weights are numbers that can be read and written.

        Args:
            what: wants it.
        Raises:
            PlanError: if matrices are quantised.
        """
        if self.quantised:
            raise PlanError(
                f"{what} does not go with a quantised checkpoint",
                why=f"its matrices are packed ({self.quantised}), and nothing here reads or writes such values",
                hint="use the model that is not quantised, and quantise the result",
            )

    def packed_along(self, address: str) -> str:
        """Why a width cannot be cut, "" where no quantised matrix is in the way.

        Args:
            address: `blocks.3.ffn.neurons`, `hidden` or `vocab`.
        """
        if not self.quantised:
            return ""
        owner, _, kind = address.rpartition(".")
        parts = self.sublayers if not owner else [s for s in self.sublayers if s.address == owner]
        refs = (*(() if owner else self.outer), *(ref for part in parts for ref in part.tensors))
        axis = WIDTHS[kind][1] if kind in WIDTHS else address
        found = next((ref.matrix for ref in refs if ref.packed is not None and axis in ref.packed.axes), "")
        return found and f"`{found}` is quantised ({self.quantised}), and packed values are not cut"

    @property
    def projection(self) -> TensorRef | None:
        """Another matrix outside blocks that every token passes, such as a ViT's patch projection."""
        return self._outer_like(self.arch.projection)

    def sublayer(self, address: str) -> SubLayer:
        """The sub-layer at an address.

        Raises:
            StructureError: if the model has none there.
        """
        if address not in self._by_address:
            why = f"it has {self.blocks[0].address} to {self.blocks[-1].address}"
            raise StructureError(f"the model has no `{address}`", why=why)
        return self._by_address[address]

    def usual(self, sublayer: SubLayer) -> Mapping[str, int]:
        """Widths that the configuration gives a sub-layer."""
        return self.widths[self._kind_of(sublayer.block, self._variant(sublayer))]

    def _variant(self, sublayer: SubLayer) -> str:
        """Kind of a sub-layer, `dense_ffn` for the FFN of a block without experts in a model that has them."""
        usual = self.widths[self._kind_of(sublayer.block, sublayer.kind)]
        return "dense_ffn" if "experts" in usual and "experts" not in sublayer.widths else sublayer.kind

    @property
    def active_experts(self) -> int:
        """Experts that a token passes in every block that has some, 0 in a model without."""
        key = self.arch.key("active_experts", self.text)
        found = self.text.get(key) or 0
        if not isinstance(found, int):
            raise StructureError(f"`{key}` must be a whole number", why=f"it is {repr(found)[:100]}", at="config.json")
        return found

    def sizes(self, sublayer: SubLayer) -> dict[str, int]:
        """Size of every axis in the layouts of a sub-layer's tensors."""
        return {"hidden": self.hidden, **_PARTS, **sublayer.widths}

    def groups(self, kind: str) -> tuple[Group, ...]:
        """Groups of a kind: one for whole units, one a sub-layer for widths.

        Raises:
            StructureError: for query heads of a model in which every head has its own key and value, and for widths
                that cannot be cut.
        """
        if kind in WIDTHS:
            if kind in self.arch.fixed:
                raise StructureError(f"{kind} of `{self.model_type}` cannot be cut", why=self.arch.fixed[kind])
            packed = next(filter(None, (self.packed_along(f"{s.address}.{kind}") for s in self.sublayers)), "")
            if packed:
                raise StructureError(f"{kind} cannot be cut here", why=packed, hint=PACKED_HINT)
            groups = tuple(self._width_groups(kind))
            if kind == "query_heads" and all(len(group.units) == 1 for group in groups):
                raise StructureError(
                    "query heads cannot go alone here",
                    why="every query head has a key and a value of its own",
                    hint="use `remove: kv_groups`, which takes a head with its key and value",
                )
            if not groups:
                raise StructureError(f"`{self.model_type}` has no {kind}")
            return groups
        if kind == HIDDEN:
            self.hidden_rule()
            units_of = tuple(f"{HIDDEN}.{i}" for i in range(self.hidden))
            return (Group(HIDDEN, HIDDEN, units_of, (tuple(self.hidden_tensors()),), HIDDEN, {HIDDEN: self.hidden}),)
        units: list[tuple[str, tuple[SubLayer, ...]]]
        if kind == "blocks":
            units = [(block.address, block.sublayers) for block in self.blocks if block.sublayers]
        else:
            units = [(s.address, (s,)) for s in self.sublayers if kind in ("sublayers", s.kind)]
            if kind == "cross_attention" and not any(kind in part.kinds for part in self.arch.each):
                raise StructureError(f"`{self.model_type}` has no cross-attention", why="no stack reads another")
        members = tuple(tuple(ref for part in parts for ref in part.tensors) for _, parts in units)
        return (Group(kind, kind, tuple(address for address, _ in units), members),)

    def hidden_rule(self) -> HiddenRule:
        """How hidden channels are cut.

        Raises:
            StructureError: where that is not known for the model, or one of its tensors.
        """
        rule, packed = self.arch.hidden, self.packed_along(HIDDEN)
        if packed:
            raise StructureError("hidden channels cannot be cut here", why=packed, hint=PACKED_HINT)
        if rule is None or self.model_type not in rule.model_types:
            raise StructureError(
                f"hidden channels of `{self.model_type}` cannot be cut", why="its norms and tables are not described"
            )
        blind = next((r for r in self.outer if any(dim == (f"d{i}",) for i, dim in enumerate(r.layout))), None)
        if blind is not None:
            why = f"which dimension of `{blind.name}` they are is not described"
            raise StructureError("hidden channels cannot be cut", why=why)
        return rule

    def hidden_tensors(self) -> Iterator[TensorRef]:
        """Tensors with a dimension of hidden channels; their other dimensions are taken whole."""
        for ref in (*self.outer, *(ref for sublayer in self.sublayers for ref in sublayer.tensors)):
            if (HIDDEN,) in ref.layout:
                layout = tuple(dim if dim == (HIDDEN,) else (f"d{i}",) for i, dim in enumerate(ref.layout))
                yield replace(ref, layout=layout)

    def _width_groups(self, kind: str) -> Iterator[Group]:
        owner, axis = WIDTHS[kind]
        for sublayer in self.sublayers:
            if sublayer.role == owner and axis in sublayer.widths:
                address = f"{sublayer.address}.{kind}"
                units = tuple(f"{address}.{i}" for i in range(sublayer.widths[axis]))
                members = tuple(
                    ref
                    for ref in sublayer.tensors
                    if any(axis in dim for dim in ref.layout) or (kind == "experts" and ref.expert is not None)
                )
                output = None if "experts" in sublayer.widths else self.output(sublayer)
                yield Group(kind, address, units, (members,), axis, self.sizes(sublayer), output)

    def output(self, sublayer: SubLayer) -> TensorRef:
        """The matrix by which a sub-layer leads back to the residual stream.

        Raises:
            StructureError: for an FFN with experts, which has one each.
        """
        if "experts" in sublayer.widths:
            raise StructureError(
                f"`{sublayer.address}` has no single output projection", why="every expert has its own"
            )
        stack = self.stack_of(sublayer.block)
        wanted = stack.output_projection(self._variant(sublayer))
        return next(ref for ref in sublayer.tensors if (place := stack.split(ref.matrix)) and place[1] == wanted)


def _address(stack: str, number: int) -> str:
    return f"{stack}.blocks.{number}" if stack else f"blocks.{number}"


def _blocks(checkpoint: Checkpoint, shape: Shape, names: Mapping[str, Piece | None], first: int) -> Iterator[Block]:
    """Blocks of a stack.

    Args:
        checkpoint: the files.
        shape: what the configuration says of the stack.
        names: of all tensors in its blocks, with what quantised matrix each is a piece of.
        first: place of its first block in the model's `blocks`.
    """
    arch = shape.arch
    owned: dict[tuple[int, str], list[TensorRef]] = {}
    for name, piece in names.items():
        number, rest = arch.split(piece.matrix if piece else name) or (0, "")
        kind, ref = _inner(checkpoint, shape, name, number, rest, piece)
        owned.setdefault((number, kind), []).append(ref)
    for number in range(shape.blocks):
        found: dict[str, Any] = {
            kind: _sublayer(shape, number, kind, owned.get((number, kind), []), first) for kind in arch.kinds
        }
        yield Block(first + number, **found, stack=arch.stack, number=number if arch.stack else None)


def _outer(checkpoint: Checkpoint, arch: Architecture, shape: Shape, name: str, piece: Piece | None) -> TensorRef:
    pattern, info = arch.find_outer(piece.matrix if piece else name), checkpoint.tensors[name]
    if pattern is None:
        raise StructureError(
            f"tensor `{name}` is not part of `{arch.name}` as prunekit knows it",
            why="cutting around a tensor nobody understands could break the model",
            at=info.file,
        )
    if piece:
        packed = Packed.of(piece, pattern.layout or (), {"hidden": shape.hidden, "vocab": shape.vocabulary})
        return TensorRef(name, info.dtype, info.shape, literal(info.shape), packed=packed)
    layout = pattern.layout or tuple((f"d{i}",) for i in range(len(info.shape)))
    if layout and layout[-1] == ("...",):
        layout = (*layout[:-1], *((f"rest{i}",) for i in range(len(layout), len(info.shape) + 1)))
    if pattern.layout is not None:
        if "embedding" in arch.keys and arch.keys["embedding"] not in shape.config:
            layout = tuple(("hidden",) if dim == ("embedding",) else dim for dim in layout)
        fixed = {"hidden": shape.hidden}
        wrong = len(layout) != len(info.shape) or any(
            dim[0] in fixed and size != fixed[dim[0]] for dim, size in zip(layout, info.shape, strict=True)
        )
        if wrong:
            raise _wrong_shape(name, info.shape, " x ".join(str(fixed.get(dim[0], dim[0])) for dim in layout))
    return TensorRef(name, info.dtype, info.shape, layout)


def _inner(
    checkpoint: Checkpoint, shape: Shape, name: str, block: int, rest: str, piece: Piece | None
) -> tuple[SublayerKind, TensorRef]:
    info, arch = checkpoint.tensors[name], shape.arch
    general, expert = arch.expert_of(rest)
    kind = next((kind for kind in arch.kinds if general in shape.tensors(block, kind)), None)
    if kind is None or block >= shape.blocks or not shape.present(block, kind):
        why = (
            f"`{arch.name}` blocks have no such tensor"
            if kind is None
            else f"the configuration has blocks 0 to {shape.blocks - 1}"
            if block >= shape.blocks
            else f"the configuration says that block {block} has no {kind}"
        )
        raise StructureError(f"unexpected tensor `{name}`", why=why, at=info.file)
    layout = shape.tensors(block, kind)[general].layout or ()
    sizes = {"hidden": shape.hidden, **_PARTS, **shape.widths(block, kind)}
    if expert is not None and expert >= sizes["experts"]:
        why = f"the configuration gives block {block} {sizes['experts']} experts"
        raise StructureError(f"unexpected tensor `{name}`", why=why, at=info.file)
    if piece:
        packed = Packed.of(piece, layout, sizes)
        return kind, TensorRef(name, info.dtype, info.shape, literal(info.shape), expert, packed)
    expected = tuple(dim_size(dim, sizes) for dim in layout)
    if expected != info.shape:
        raise _wrong_shape(name, info.shape, " x ".join(map(str, expected)))
    return kind, TensorRef(name, info.dtype, info.shape, layout, expert)


def _wrong_shape(name: str, shape: tuple[int, ...], expected: str) -> StructureError:
    found = " x ".join(map(str, shape)) or "a scalar"
    return StructureError(f"tensor `{name}` has the wrong shape", why=f"it is {found}; config.json makes it {expected}")


def _sublayer(shape: Shape, block: int, kind: SublayerKind, tensors: list[TensorRef], first: int) -> SubLayer | None:
    arch = shape.arch
    if not shape.present(block, kind):
        return None
    held = {place[1] for ref in tensors if (place := arch.split(ref.matrix))}
    wanted = [name for name, pattern in shape.tensors(block, kind).items() if not pattern.optional]
    experts = range(shape.widths(block, kind).get("experts", 1))
    missing = [one for name in wanted for i in experts if (one := name.format(expert=i)) not in held]
    if missing:
        raise StructureError(
            f"block {block} lacks `{missing[0]}`",
            why=f"{len(missing)} tensors of its {kind} are not in the files",
            hint="the checkpoint is incomplete, or its configuration is of another model",
        )
    address = f"{_address(arch.stack, block)}.{kind}"
    return SubLayer(address, kind, first + block, shape.widths(block, kind), tuple(tensors))
