"""Quantised matrices: several tensors on disk that stand for one, and that no cut goes through."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prunekit.structure.architecture import Architecture, Layout

# Sections of a configuration that say how a checkpoint was quantised; the second is an older name of the first.
SECTIONS = ("quantization_config", "compression_config")
_CACHE_SCALE = re.compile(r"([qkv])_(?:scale|zero_point)")


@dataclass(frozen=True)
class Piece:
    """A tensor of a quantised matrix.

    Args:
        matrix: name that the matrix has in a checkpoint that is not quantised.
        holds: whether it is the one that holds the weights: that of the matrix's own name, or the largest.
    """

    matrix: str
    holds: bool


@dataclass(frozen=True)
class Packed:
    """What a tensor has to do with the quantised matrix it belongs to.

    Args:
        matrix: name that the matrix has in a checkpoint that is not quantised.
        weights: of the matrix, said of the tensor that holds them; 0 of the others, such as scales.
        axes: what the matrix's dimensions factor into; the tensor follows no cut along them.
    """

    matrix: str
    weights: int
    axes: frozenset[str]

    @classmethod
    def of(cls, piece: Piece, layout: Layout, sizes: Mapping[str, int]) -> Packed:
        """A tensor of a matrix.

        Args:
            piece: which.
            layout: of the matrix where it is not quantised.
            sizes: of the axes; what is not there counts nothing.
        """
        axes = frozenset(axis for dim in layout for axis in dim if axis != "+")
        count = math.prod(_length(dim, sizes) for dim in layout) if piece.holds else 0
        return cls(piece.matrix, count, axes)


def _length(dim: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    parts = " ".join(dim).split("+")
    return sum(math.prod(sizes.get(axis, 0) for axis in part.split()) for part in parts)


def literal(shape: Iterable[int]) -> Layout:
    """The layout of a tensor whose dimensions are plain lengths, to be taken whole."""
    return tuple((str(size),) for size in shape)


def quant_method(config: Mapping[str, Any]) -> str:
    """How a configuration says that its checkpoint is quantised, "" where it does not."""
    section = next((config[key] for key in SECTIONS if isinstance(config.get(key), Mapping)), None)
    return "" if section is None else str(section.get("quant_method", "quantised"))


def packed_pieces(config: Mapping[str, Any], sizes: Mapping[str, int], arch: Architecture) -> dict[str, Piece]:
    """The tensors of quantised matrices, by name.

    A quantised matrix `q_proj.weight` is stored under other names of its module, `q_proj.qweight` with `q_proj.scales`,
    or under its own with others beside it, `q_proj.weight` with `q_proj.weight_scale_inv`. What the numbers mean is up
    to the method; that they belong to the module is all that a cut around it needs.

    Args:
        config: of the checkpoint; nothing is quantised where it does not say so.
        sizes: bytes of every tensor by name.
        arch: knows the names.
    """
    if not quant_method(config):
        return {}
    found = {name: matrix for name in sizes if not _known(arch, name) and (matrix := _matrix(arch, name))}
    found |= {matrix: matrix for matrix in found.values() if matrix in sizes}
    holds: dict[str, str] = {}
    for name, matrix in found.items():
        best = holds.get(matrix, "")
        if name == matrix or (best != matrix and sizes[name] > sizes.get(best, -1)):
            holds[matrix] = name
    return {name: Piece(matrix, holds[matrix] == name) for name, matrix in found.items()}


def _matrix(arch: Architecture, name: str) -> str:
    """The matrix that a tensor of an unknown name belongs to, "" where there is none."""
    parts = name.split(".")
    scale = _CACHE_SCALE.fullmatch(parts[-1])
    if scale and _is_matrix(arch, beside := ".".join([*parts[:-1], f"{scale[1]}_proj.weight"])):
        return beside
    stems = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    return next((one for stem in stems for one in (stem, f"{stem}.weight") if _is_matrix(arch, one)), "")


def _known(arch: Architecture, name: str) -> bool:
    place = _place(arch, name)
    if place is None:
        return arch.is_ignored(name) or arch.find_outer(name) is not None
    stack, general = place
    return arch.is_ignored(name) or any(general in known for known in stack.sublayers.values())


def _is_matrix(arch: Architecture, name: str) -> bool:
    place = _place(arch, name)
    if place is None:
        pattern = arch.find_outer(name)
        return pattern is not None and len(pattern.layout or ()) == 2
    stack, general = place
    return any(general in known and len(known[general].layout or ()) == 2 for known in stack.sublayers.values())


def _place(arch: Architecture, name: str) -> tuple[Architecture, str] | None:
    """The stack that a tensor is in and the rest of its name there, of any expert; None outside blocks."""
    places = ((stack, stack.split(name)) for stack in arch.each)
    return next(((stack, stack.expert_of(place[1])[0]) for stack, place in places if place is not None), None)
