"""A checkpoint seen as blocks, sub-layers and groups of units, from its headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.errors import PlanError, StructureError
from prunekit.structure._tensors import blocks_in, outer_tensor
from prunekit.structure.architecture import (
    PREFIX,
    Architecture,
    HiddenRule,
    Norm,
    architecture,
)
from prunekit.structure.packed import Piece, packed_pieces, quant_method
from prunekit.structure.parts import FUSED, HIDDEN, WIDTHS, Block, Group, SubLayer, TensorRef, address_of
from prunekit.structure.shape import Shape, text_config

# Parts of heads that architecture files do not name one by one.
_HEADS = re.compile(r".*(?:predictions|decoder|lm_head|vocab_projector)\.(?:weight|bias)")
PACKED_HINT = "remove blocks or sub-layers, or cut the model before it is quantised"


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
                outer.append(outer_tensor(checkpoint, arch, shapes[0], name, piece))
            else:
                held[part][name] = piece
        blocks: list[Block] = []
        for shape, names in zip(shapes, held, strict=True):
            blocks += blocks_in(checkpoint, shape, names, len(blocks))
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
            address_of(stack, int(number)): layer
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
        return {"hidden": self.hidden, **FUSED, **sublayer.widths}

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
