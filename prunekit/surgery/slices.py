"""Cuts through tensors: which positions of a dimension stay follows from the axes it factors into.

torch is imported where a tensor is cut, so that dropping whole sub-layers starts without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.errors import SurgeryError
from prunekit.plan.plan import VOCAB, Plan
from prunekit.structure.architecture import Layout, dim_size, sections
from prunekit.structure.parts import HIDDEN, WIDTHS, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

Keep = Mapping[str, Sequence[int]]
# Head width is never cut: softmax scale and rotary positions depend on it. What norms make of a cut hidden width is
# for `surgery.hidden` to say.
CUTTABLE = frozenset((*(axis for _, axis in WIDTHS.values()), HIDDEN, VOCAB))
_PIECE_BYTES = 64 << 20


def take(tensor: Tensor, layout: Layout, sizes: Mapping[str, int], keep: Keep) -> Tensor:
    """What is left of a tensor.

    A matrix [6, 2] with layout `(("kv", "hd"), ("hidden",))`, sizes `{"kv": 3, "hd": 2}` and keep `{"kv": (0, 2)}`
    leaves rows 0, 1, 4 and 5.

    Args:
        tensor: any type.
        layout: for each dimension the axes it factors into, outermost first.
        sizes: size of every axis; a dimension that is one axis needs none.
        keep: positions that stay, by axis; axes that the tensor does not have are no matter.
    Returns:
        A tensor of the same type with memory of its own, or the tensor itself where nothing goes.
    Raises:
        SurgeryError: for an axis that cannot be cut, or a tensor that does not have this layout.
    """
    _require_cuttable(keep)
    _require_layout(tuple(tensor.shape), layout, sizes)
    for place, dim in enumerate(layout):
        if any(axis in keep for axis in dim):
            tensor = _selected(tensor, place, _kept(tensor.shape[place], dim, sizes, keep))
    return tensor


def spread(tensor: Tensor, shape: tuple[int, ...], layout: Layout, sizes: Mapping[str, int], keep: Keep) -> Tensor:
    """Puts what `take` left back to its positions, zeros between; arguments as there.

    Args:
        shape: of the tensor before.
    Raises:
        SurgeryError: for an axis that cannot be cut, or a tensor that is not what `take` leaves.
    """
    expected = cut_shape(shape, layout, sizes, keep)
    if tuple(tensor.shape) != expected:
        raise SurgeryError(f"a tensor has the shape {list(tensor.shape)}", why=f"{list(expected)} is what the cut left")
    for place, dim in enumerate(layout):
        if any(axis in keep for axis in dim):
            positions = _kept(shape[place], dim, sizes, keep)
            zeros = tensor.new_zeros((*tensor.shape[:place], shape[place], *tensor.shape[place + 1 :]))
            tensor = zeros.index_copy(place, positions, tensor)
    return tensor


def cut_shape(shape: tuple[int, ...], layout: Layout, sizes: Mapping[str, int], keep: Keep) -> tuple[int, ...]:
    """Shape of what `take` leaves; arguments as there."""
    _require_cuttable(keep)
    _require_layout(shape, layout, sizes)
    left = {**sizes, **{axis: len(positions) for axis, positions in keep.items()}}
    return tuple(
        dim_size(dim, left) if any(axis in keep for axis in dim) else size
        for size, dim in zip(shape, layout, strict=True)
    )


def cut_pieces(
    checkpoint: Checkpoint, ref: TensorRef, sizes: Mapping[str, int], keep: Keep, piece_bytes: int = _PIECE_BYTES
) -> Iterator[Tensor]:
    """What is left of a tensor on disk, as pieces of its first dimension in order.

    Args:
        ref: a tensor of rank 1 or more with an axis in `keep`.
        piece_bytes: most bytes to read at a time, at least one row; rows between pieces are not read where none stays.
    """
    n_rows = ref.shape[0]
    rows = _kept(n_rows, ref.layout[0], sizes, keep)
    inner = (("row",), *ref.layout[1:])
    step = max(1, piece_bytes * n_rows // max(1, checkpoint.tensors[ref.name].n_bytes))
    for first in range(0, n_rows, step):
        here = rows[(rows >= first) & (rows < first + step)]
        if len(here):
            begin, end = int(here[0]), int(here[-1]) + 1
            part = checkpoint.read_rows(ref.name, begin, end)
            if len(here) < end - begin:
                part = _selected(part, 0, here - begin)
            yield take(part, inner, sizes, keep)


def hidden_of(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Hidden channels that stay as positions by axis; empty where all do."""
    return {HIDDEN: tuple(plan.keep[HIDDEN])} if HIDDEN in plan.keep else {}


def cuts_of(plan: Plan) -> dict[str, dict[str, tuple[int, ...]]]:
    """Positions that stay by axis, for each sub-layer that a plan narrows; without those of hidden channels.

    Raises:
        SurgeryError: for a kind of width that the engine does not cut.
    """
    cuts: dict[str, dict[str, tuple[int, ...]]] = {}
    for group, kept in plan.keep.items():
        if group in (HIDDEN, VOCAB):
            continue
        address, _, kind = group.rpartition(".")
        if kind not in WIDTHS:
            raise SurgeryError(f"`{group}` cannot be cut", why=f"widths are {', '.join(WIDTHS)}")
        cuts.setdefault(address, {})[WIDTHS[kind][1]] = tuple(kept)
    return cuts


def _selected(tensor: Tensor, place: int, positions: Sequence[int] | Tensor) -> Tensor:
    """Some positions of a dimension, for any type: values move as whole numbers of their size, bit for bit."""
    import torch

    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.view(raw).index_select(place, torch.as_tensor(positions, dtype=torch.int64)).view(tensor.dtype)


def _require_cuttable(keep: Keep) -> None:
    for axis in keep:
        if axis not in CUTTABLE:
            why = "heads, neurons, experts, hidden channels and vocabulary rows can go; other widths change the rest"
            raise SurgeryError(f"axis `{axis}` cannot be cut", why=why)


def _kept(length: int, dim: tuple[str, ...], sizes: Mapping[str, int], keep: Keep) -> Tensor:
    """Positions of a dimension that stay, int64, in order."""
    import torch

    lengths = [_length(part, length, sizes) for part in sections(dim)]
    found = []
    for part, positions in zip(sections(dim), torch.arange(length).split(lengths), strict=True):
        left = positions.unflatten(0, [sizes.get(axis, length) for axis in part])
        for place, axis in enumerate(part):
            if axis in keep:
                left = left.index_select(place, torch.as_tensor(keep[axis], dtype=torch.int64))
        found.append(left.flatten())
    return torch.cat(found)


def _length(part: tuple[str, ...], length: int, sizes: Mapping[str, int]) -> int:
    """Length of a section; an axis of unknown size is a whole dimension."""
    return math.prod(sizes.get(axis, length) for axis in part)


def _require_layout(shape: tuple[int, ...], layout: Layout, sizes: Mapping[str, int]) -> None:
    found = tuple(
        sum(_length(part, length, sizes) for part in sections(dim)) for length, dim in zip(shape, layout, strict=False)
    )
    if len(shape) != len(layout) or found != shape:
        raise SurgeryError(f"a tensor of shape {list(shape)} does not have the layout {layout}")
