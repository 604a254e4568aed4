"""Cuts through tensors: reshape into axes, take what stays, reshape back.

torch is imported where a tensor is cut, so that dropping whole sub-layers starts without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.errors import SurgeryError
from prunekit.plan.plan import Plan
from prunekit.structure.architecture import Layout
from prunekit.structure.view import WIDTHS, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

Keep = Mapping[str, Sequence[int]]
# Head width and hidden width are never cut: softmax scale, rotary positions and norms depend on them.
CUTTABLE = frozenset(axis for _, axis in WIDTHS.values())
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
    split = _axis_sizes(tuple(tensor.shape), layout, sizes)
    axes = [axis for dim in layout for axis in dim]
    shape = cut_shape(tuple(tensor.shape), layout, sizes, keep)
    if not any(axis in keep for axis in axes):
        return tensor
    left = tensor.reshape(split)
    for place, axis in enumerate(axes):
        if axis in keep:
            left = _selected(left, place, keep[axis])
    return left.reshape(shape)


def cut_shape(shape: tuple[int, ...], layout: Layout, sizes: Mapping[str, int], keep: Keep) -> tuple[int, ...]:
    """Shape of what `take` leaves; arguments as there."""
    _require_cuttable(keep)
    split = iter(_axis_sizes(shape, layout, sizes))
    left = [
        [len(keep[axis]) if axis in keep else size for axis, size in zip(dim, split, strict=False)] for dim in layout
    ]
    return tuple(map(math.prod, left))


def cut_pieces(
    checkpoint: Checkpoint, ref: TensorRef, sizes: Mapping[str, int], keep: Keep, piece_bytes: int = _PIECE_BYTES
) -> Iterator[Tensor]:
    """What is left of a tensor on disk, as pieces of its first dimension in order.

    Args:
        ref: a tensor of rank 1 or more with an axis in `keep`.
        piece_bytes: most bytes to read at a time, at least one row; rows between pieces are not read where none stays.
    """
    import torch

    n_rows = ref.shape[0]
    rows = take(torch.arange(n_rows), ref.layout[:1], sizes, keep)
    inner = (("",), *ref.layout[1:])
    step = max(1, piece_bytes * n_rows // max(1, checkpoint.tensors[ref.name].n_bytes))
    for first in range(0, n_rows, step):
        here = rows[(rows >= first) & (rows < first + step)]
        if len(here):
            begin, end = int(here[0]), int(here[-1]) + 1
            part = checkpoint.read_rows(ref.name, begin, end)
            if len(here) < end - begin:
                part = _selected(part, 0, here - begin)
            yield take(part, inner, sizes, keep)


def cuts_of(plan: Plan) -> dict[str, dict[str, tuple[int, ...]]]:
    """Positions that stay by axis, for each sub-layer that a plan narrows.

    Raises:
        SurgeryError: for a kind of width that the engine does not cut.
    """
    cuts: dict[str, dict[str, tuple[int, ...]]] = {}
    for group, kept in plan.keep.items():
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
            why = "only KV groups, query heads and neurons can go; other widths change what the rest computes"
            raise SurgeryError(f"axis `{axis}` cannot be cut", why=why)


def _axis_sizes(shape: tuple[int, ...], layout: Layout, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Size of every axis of a layout in order, checked against the tensor's shape."""
    dims = [[sizes.get(axis, size) for axis in dim] for size, dim in zip(shape, layout, strict=False)]
    if len(shape) != len(layout) or tuple(map(math.prod, dims)) != shape:
        raise SurgeryError(f"a tensor of shape {list(shape)} does not have the layout {layout}")
    return tuple(size for dim in dims for size in dim)
