"""How scores read weights: by name, and in pieces where a tensor may be large."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from prunekit.structure.architecture import dim_size, sections

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.checkpoint.reader import Checkpoint
    from prunekit.structure.architecture import Layout
    from prunekit.structure.parts import TensorRef

# Reads a tensor by its name. What also has `rows(name, first, end)` is read in pieces.
Weights = Callable[[str], "Tensor"]

# Large enough that reading stays sequential, small enough that a few threads hold little.
PIECE_BYTES = 8 * 2**20


class CheckpointWeights:
    """Weights straight from a checkpoint's files; no model is built.

    Args:
        checkpoint: an open checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __call__(self, name: str) -> Tensor:
        return self._checkpoint.read(name)

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows `first` to `end` (not included) of a tensor."""
        return self._checkpoint.read_rows(name, first, end)


def matrices(refs: Iterable[TensorRef]) -> tuple[TensorRef, ...]:
    """The tensors of rank 2: projection weights, without biases and norms."""
    return tuple(ref for ref in refs if len(ref.shape) == 2)


def pieces(weights: Weights, ref: TensorRef, piece_bytes: int = PIECE_BYTES) -> Iterator[Callable[[], Tensor]]:
    """Readers of consecutive row ranges that cover a tensor, each of about `piece_bytes` and at least one row.

    Weights without `rows` give one reader, of the whole tensor.
    """
    rows: Any = getattr(weights, "rows", None)
    if rows is None:
        yield partial(weights, ref.name)
        return
    # Four bytes a value is right for float32 and at most twice too much for the 16-bit types.
    step = max(1, piece_bytes // max(1, 4 * math.prod(ref.shape[1:])))
    for first in range(0, ref.shape[0], step):
        yield partial(rows, ref.name, first, min(first + step, ref.shape[0]))


def by_axis(tensor: Tensor, layout: Layout, axis: str, sizes: Mapping[str, int]) -> Tensor:
    """A tensor with one row a position of an axis.

    Args:
        tensor: weights.
        layout: for each dimension the axes it factors into.
        axis: one of them.
        sizes: size of every axis.
    Returns:
        [positions, everything else]; an output projection [32, kv 2 x rep 2 x hd 8] by `kv` gives [2, 512]. Sections
        of a dimension follow each other; each has the axis, or those without it are left out.
    """
    import torch

    place = next(place for place, dim in enumerate(layout) if axis in dim)
    found = []
    lengths = [dim_size(part, sizes) for part in sections(layout[place])]
    for part, piece in zip(sections(layout[place]), tensor.split(lengths, dim=place), strict=True):
        if axis in part:
            apart = piece.unflatten(place, [sizes[name] for name in part])
            found.append(apart.movedim(place + part.index(axis), 0).flatten(1))
    return torch.cat(found, dim=1)
