"""Writes a cut checkpoint in the shapes of the model it was cut from, zeros where something went.

It loads wherever the dense model does, computes what the cut model computes, and saves nothing: a check of one against
the other in any tool, and no way to serve.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.checkpoint.reader import Checkpoint, torch_dtypes
from prunekit.checkpoint.sources import resolve
from prunekit.checkpoint.writer import OutTensor, Stored, disk_errors, write_weights
from prunekit.core.errors import CheckpointError, ExportError, PlanError
from prunekit.core.files import atomic_folder, write_json, write_text
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.plan.layout import Layout, choose_layout, placed
from prunekit.plan.plan import VOCAB, Plan
from prunekit.structure.parts import HIDDEN, TensorRef
from prunekit.structure.view import ModelView
from prunekit.surgery.sidecar import model_files, write_model_files
from prunekit.surgery.slices import Keep, cuts_of, spread

if TYPE_CHECKING:
    from torch import Tensor

LABEL = "original shapes, zeros where something was removed: saves nothing, for A/B checks only"
_MANIFEST = "prunekit.json"


@dataclass(frozen=True)
class MaskedReport:
    """What an export wrote.

    Args:
        saves: what it saves, in words.
        zeros: weights that are zero because they were removed.
        params: all weights.
        file_bytes: of the weights.
        seconds: of the whole export.
    """

    saves: str
    zeros: int
    params: int
    file_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Cut:
    """A cut folder beside what it was cut from.

    Args:
        dense: the source; only its shapes and its configuration are read.
        plan: what went.
        layout: of the cut folder.
        folder: the cut folder; weights that stay are its own, healed or not.
    """

    dense: ModelView
    plan: Plan
    layout: Layout
    folder: Path


def export_masked(
    cut: Cut, out_folder: Path, progress: Progress = NULL_PROGRESS, *, max_shard_bytes: int = 5_000_000_000
) -> MaskedReport:
    """Writes a cut model in its source's shapes.

    Args:
        cut: both models.
        out_folder: folder to write; it may exist if it is empty.
        progress: told of bytes.
        max_shard_bytes: largest weight file.
    Raises:
        PlanError: if zeros would not compute what the cut model computes.
    """
    start = time.perf_counter()
    require_maskable(cut.dense, cut.plan)
    left = Checkpoint.open(cut.folder)
    tensors = list(_tensors(cut, left))
    others = model_files(cut.folder)
    with atomic_folder(out_folder, overwrite=out_folder.exists()) as unfinished:
        names = write_weights(unfinished, tensors, max_shard_bytes, progress)
        with disk_errors(unfinished):
            write_json(unfinished / "config.json", cut.dense.config)
            write_model_files(cut.folder, others, unfinished)
            write_text(unfinished / "README.md", f"# Masked copy\n\nWritten by prunekit: {LABEL}.\n")
        size = sum((unfinished / name).stat().st_size for name in names)
    params = sum(math.prod(tensor.shape) for tensor in tensors)
    kept = sum(math.prod(info.shape) for info in left.tensors.values())
    return MaskedReport(LABEL, params - kept, params, size, time.perf_counter() - start)


def require_maskable(view: ModelView, plan: Plan | None) -> None:
    """Makes sure that zeros compute what a plan leaves; without one that they may.

    Raises:
        PlanError: naming the rule.
    """
    hint = "leave `masked` out"
    view.require_plain("`masked`")
    if view.heterogeneous:
        raise PlanError("the model's blocks differ already", why="no stock class has its shapes", hint=hint)
    if plan is None:
        return
    if plan.drop and view.norm == "post":
        why = "its norms act on the residual stream too, so a block without a sub-layer is not one with zeros in it"
        raise PlanError(f"`{view.model_type}` cannot have masked sub-layers", why=why, hint=hint)
    if VOCAB in plan.keep:
        raise PlanError("vocabulary rows cannot be masked", why="tokens have other numbers afterwards", hint=hint)
    if HIDDEN in plan.keep:
        why = "norms and positions are scaled for the channels that stay"
        raise PlanError("hidden channels cannot be masked", why=why, hint=hint)
    experts = next((address for address in plan.keep if address.endswith(".experts")), None)
    if experts is not None:
        raise PlanError(
            f"`{experts}` cannot be masked", why="a router with zeros still sends tokens to removed experts", hint=hint
        )


def open_cut(model_folder: Path, source: str | None = None, progress: Progress = NULL_PROGRESS) -> Cut:
    """A cut folder and its source, by its manifest.

    Args:
        model_folder: written by `prunekit prune`.
        source: the dense model, where it is no longer what the manifest names.
        progress: told of downloads.
    Raises:
        ExportError: if the folder has no manifest, or the source is not found.
        PlanError: if the source is another model.
    """
    file = model_folder / _MANIFEST
    if not file.is_file():
        hint = "only folders of `prunekit prune` can be masked"
        raise ExportError(f"`{model_folder}` has no {_MANIFEST}", why="it says what was removed", hint=hint)
    manifest = json.loads(file.read_text("utf-8"))
    said = manifest["recipe"]["model"] if source is None else {"source": source}
    try:
        dense = ModelView.open(resolve(said["source"], said.get("revision"), progress=progress).folder)
    except CheckpointError as error:
        raise ExportError(
            f"the model that was cut is not found: {error}", error.why, "give it as --source MODEL", error.at
        ) from error
    plan = Plan.from_json(manifest["plan"])
    plan.check(dense)
    wanted = "heterogeneous" if manifest["layout"] == "heterogeneous" else "auto"
    return Cut(dense, plan, choose_layout(dense, plan, wanted), model_folder)


def _tensors(cut: Cut, left: Checkpoint) -> Iterator[OutTensor]:
    """Every tensor of the dense model, in its order."""
    place = {sublayer.address: number for number, sublayer in placed(cut.dense, cut.layout)}
    cuts = cuts_of(cut.plan)
    for ref in cut.dense.outer:
        yield _same(left, ref.name, ref)
    for sublayer in cut.dense.sublayers:
        keep = cuts.get(sublayer.address, {})
        sizes = cut.dense.sizes(sublayer)
        for ref in sublayer.tensors:
            if sublayer.address not in place:
                yield OutTensor(ref.name, ref.dtype, ref.shape, partial(_zeros, ref))
                continue
            name = cut.dense.stack_of(sublayer.block).renumbered(ref.name, place[sublayer.address])
            if any(axis in keep for dim in ref.layout for axis in dim):
                content = partial(_spread, left, name, ref, sizes, keep)
                yield OutTensor(ref.name, left.tensors[name].dtype, ref.shape, content)
            else:
                yield _same(left, name, ref)


def _same(left: Checkpoint, name: str, ref: TensorRef) -> OutTensor:
    info = left.tensors[name]
    return OutTensor(ref.name, info.dtype, ref.shape, Stored(left.folder / info.file, info.start))


def _spread(left: Checkpoint, name: str, ref: TensorRef, sizes: Mapping[str, int], keep: Keep) -> Iterator[Tensor]:
    yield spread(left.read(name), ref.shape, ref.layout, sizes, keep)


def _zeros(ref: TensorRef) -> Iterator[Tensor]:
    import torch

    yield torch.zeros(ref.shape, dtype=torch_dtypes()[ref.dtype])
