"""Tensors of a checkpoint sorted into blocks and sub-layers, each of the shape that its configuration gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.errors import StructureError
from prunekit.structure.architecture import Architecture, SublayerKind, dim_size
from prunekit.structure.packed import Packed, Piece, literal
from prunekit.structure.parts import FUSED, Block, SubLayer, TensorRef, address_of
from prunekit.structure.shape import Shape


def blocks_in(checkpoint: Checkpoint, shape: Shape, names: Mapping[str, Piece | None], first: int) -> Iterator[Block]:
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


def outer_tensor(checkpoint: Checkpoint, arch: Architecture, shape: Shape, name: str, piece: Piece | None) -> TensorRef:
    """A tensor outside the blocks.

    Args:
        checkpoint: the files.
        arch: of the model or of the stack that the tensor is beside.
        shape: what the configuration says of it.
        name: in the checkpoint.
        piece: the quantised matrix that it is a piece of, None for none.
    Raises:
        StructureError: if the architecture has no such tensor, or of another shape.
    """
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
    sizes = {"hidden": shape.hidden, **FUSED, **shape.widths(block, kind)}
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
    address = f"{address_of(arch.stack, block)}.{kind}"
    return SubLayer(address, kind, first + block, shape.widths(block, kind), tuple(tensors))
