"""Cuts through single tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.errors import SurgeryError
from prunekit.structure.parts import TensorRef
from prunekit.surgery.slices import cut_pieces, cut_shape, take

SIZES = {"kv": 3, "rep": 2, "hd": 4, "part": 3, "hidden": 5, "ffn": 7}
QUERY = (("kv", "rep", "hd"), ("hidden",))
# Rows of queries, keys and values that are left of KV groups 0 and 2 with the second query head each.
PARTS = ((4, 8), (20, 24), (24, 28), (32, 36), (36, 40), (44, 48))
FUSED = (("hidden",), ("part", "kv", "rep", "hd"))


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def test_groups_and_heads_go_at_once() -> None:
    weight = numbered(24, 5)
    left = take(weight, QUERY, SIZES, {"kv": (0, 2), "rep": (1,)})
    assert torch.equal(left, torch.cat([weight[4:8], weight[20:24]]))


def test_fused_matrix_loses_the_same_heads_in_each_part() -> None:
    weight = numbered(5, 72)
    left = take(weight, FUSED, SIZES, {"kv": (1,)})
    assert torch.equal(left, torch.cat([weight[:, 8:16], weight[:, 32:40], weight[:, 56:64]], dim=1))


def test_sections_lose_their_own_part() -> None:
    """Two query heads to a key and a value, all in one matrix."""
    weight = numbered(48, 5)
    layout = (("kv", "rep", "hd", "+", "kv", "hd", "+", "kv", "hd"), ("hidden",))
    left = take(weight, layout, SIZES, {"kv": (0, 2), "rep": (1,)})
    assert torch.equal(left, torch.cat([weight[rows] for rows in map(slice, *zip(*PARTS, strict=True))]))
    assert tuple(left.shape) == cut_shape((48, 5), layout, SIZES, {"kv": (0, 2), "rep": (1,)}) == (24, 5)


def test_axis_the_tensor_lacks_changes_nothing() -> None:
    weight = numbered(24, 5)
    assert take(weight, QUERY, SIZES, {"ffn": (0,)}) is weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_any_type_keeps_its_bits(dtype: torch.dtype) -> None:
    weight = (numbered(7, 3) % 5 - 2).to(dtype)
    left = take(weight, (("ffn",), ("hidden2",)), SIZES, {"ffn": (1, 6)})
    assert left.dtype == dtype
    assert left.view(torch.uint8).tolist() == weight.view(torch.uint8)[[1, 6]].tolist()


@pytest.mark.parametrize("axis", ["hd", "part"])
def test_other_axes_are_refused(axis: str) -> None:
    with pytest.raises(SurgeryError, match=f"`{axis}` cannot be cut"):
        take(numbered(24, 5), QUERY, SIZES, {axis: (0,)})


def test_tensor_of_another_layout_is_refused() -> None:
    with pytest.raises(SurgeryError, match="does not have the layout"):
        take(numbered(23, 5), QUERY, SIZES, {"kv": (0,)})


@pytest.mark.parametrize("piece_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize(
    ("shape", "layout", "keep"),
    [
        ((24, 5), QUERY, {"kv": (0, 2), "rep": (1,)}),
        ((5, 72), FUSED, {"kv": (1,)}),
        ((7,), (("ffn",),), {"ffn": (0, 3, 4)}),
        ((7, 7), (("ffn",), ("ffn",)), {"ffn": (2, 6)}),
    ],
    ids=["rows", "columns", "vector", "both"],
)
def test_pieces_from_disk_add_up_to_the_whole(
    tmp_path: Path, shape: tuple[int, ...], layout: tuple[tuple[str, ...], ...], keep: dict, piece_bytes: int
) -> None:
    whole = numbered(*shape)
    save_file({"w": whole}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    pieces = cut_pieces(Checkpoint.open(tmp_path), TensorRef("w", "F32", shape, layout), SIZES, keep, piece_bytes)
    left = torch.cat(list(pieces))
    assert tuple(left.shape) == cut_shape(shape, layout, SIZES, keep)
    assert torch.equal(left, take(whole, layout, SIZES, keep))
