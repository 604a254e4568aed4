"""Carries out a plan on a checkpoint: from files to files, a piece of one tensor in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import prunekit.modeling
from prunekit.checkpoint.writer import OutTensor, Stored, disk_errors, write_weights
from prunekit.core.errors import SurgeryError
from prunekit.core.files import write_json
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.plan.cost import kept_experts, kept_hidden
from prunekit.plan.layout import Layout, choose_layout, placed
from prunekit.plan.plan import VOCAB, Plan
from prunekit.structure.parts import TensorRef
from prunekit.structure.view import ModelView
from prunekit.surgery.alignment import write_alignment
from prunekit.surgery.config import cut_config
from prunekit.surgery.hidden import scale
from prunekit.surgery.sidecar import model_files, write_model_files, write_pooled_width
from prunekit.surgery.slices import Keep, cut_pieces, cut_shape, cuts_of, hidden_of
from prunekit.surgery.vocabulary import cut_ids, write_vocabulary

if TYPE_CHECKING:
    from torch import Tensor

MODELING_FILE = "modeling_prunekit.py"


def apply(
    view: ModelView,
    plan: Plan,
    folder: Path,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress = NULL_PROGRESS,
    layout: Layout | None = None,
    replaced: Mapping[str, Tensor] | None = None,
) -> Layout:
    """Writes the cut checkpoint; the source is only read.

    Tensors keep the order they have in the source's files, so that what stays is copied in long stretches.

    Args:
        view: the model to cut.
        plan: what goes.
        folder: existing and empty; gets weights, configuration, tokenizer and what else belongs to the model.
        max_shard_bytes: largest weight file.
        progress: told of bytes written.
        layout: format of the result; the simplest that can hold it by default.
        replaced: new values of tensors by their names in the source, in the types of the source and the shapes that
            the plan leaves.
    Returns:
        The layout.
    Raises:
        PlanError: if the plan is not for this model.
        SurgeryError: if the cut cannot be carried out, or the disk is full.
        CheckpointError: if the source cannot be read.
    """
    plan.check(view)
    layout = choose_layout(view, plan) if layout is None else layout
    _require_complete(view, plan, layout)
    config = cut_ids(cut_config(view, plan, layout), view, plan)
    source = view.checkpoint.folder
    others = model_files(source)
    tensors = sorted(_tensors(view, plan, layout, replaced or {}), key=lambda pair: _place(view, pair[0]))
    write_weights(folder, [tensor for _, tensor in tensors], max_shard_bytes, progress)
    with disk_errors(folder):
        write_json(folder / "config.json", config)
        write_model_files(source, others, folder)
        write_pooled_width(folder, view.hidden, kept_hidden(view, plan))
        if VOCAB in plan.keep:
            write_vocabulary(source, folder, plan.keep[VOCAB])
        write_alignment(folder, view, plan)
        if layout.kind == "heterogeneous":
            shutil.copyfile(Path(prunekit.modeling.__path__[0]) / MODELING_FILE, folder / MODELING_FILE)
    return layout


def _require_complete(view: ModelView, plan: Plan, layout: Layout) -> None:
    """A layout must hold every sub-layer that stays once, in the order it has in the source."""
    found = [s.address for _, s in placed(view, layout)]
    expected = [s.address for s in view.sublayers if s.address not in plan.drop]
    if found != expected:
        odd = next((a for a in [*found, *expected] if found.count(a) != 1 or expected.count(a) != 1), "their order")
        raise SurgeryError("the layout does not fit the plan", why=f"they differ in {odd}")


def _tensors(
    view: ModelView, plan: Plan, layout: Layout, replaced: Mapping[str, Tensor]
) -> Iterator[tuple[TensorRef, OutTensor]]:
    """Every tensor of the result beside the one it comes from."""
    cuts = cuts_of(plan)
    narrow = hidden_of(plan)
    for ref in view.outer:
        yield ref, _outer(view, plan, ref, replaced.get(ref.name))
    for new, sublayer in placed(view, layout):
        sizes, keep = view.sizes(sublayer), {**cuts.get(sublayer.address, {}), **narrow}
        experts = kept_experts(sublayer, plan)
        for ref in sublayer.tensors:
            if ref.expert is not None and ref.expert not in experts:
                continue
            shape = cut_shape(ref.shape, ref.layout, sizes, keep)
            content: Stored | Callable[[], Iterator[Tensor]] = _stored(view, ref)
            if ref.name in replaced:
                content = partial(iter, [replaced[ref.name]])
            elif any(axis in keep for dim in ref.layout for axis in dim):
                content = partial(_pieces, view, ref, sizes, keep, scale(view, plan, ref, sublayer) if narrow else 1.0)
            expert = None if ref.expert is None else experts[ref.expert]
            yield (
                ref,
                OutTensor(view.stack_of(sublayer.block).renumbered(ref.name, new, expert), ref.dtype, shape, content),
            )


def _outer(view: ModelView, plan: Plan, ref: TensorRef, replaced: Tensor | None) -> OutTensor:
    """A tensor outside blocks; only hidden channels and vocabulary rows of it can go."""
    keep = hidden_of(plan)
    if VOCAB in plan.keep and view.is_rows(ref):
        keep = {**keep, VOCAB: tuple(plan.keep[VOCAB])}
        ref = replace(ref, layout=((VOCAB,), *ref.layout[1:]))
    shape = cut_shape(ref.shape, ref.layout, {}, keep)
    content: Stored | Callable[[], Iterator[Tensor]] = _stored(view, ref)
    if replaced is not None:
        content = partial(iter, [replaced[list(keep[VOCAB])] if VOCAB in keep else replaced])
    elif any(axis in keep for dim in ref.layout for axis in dim):
        content = partial(_pieces, view, ref, {}, keep, scale(view, plan, ref))
    return OutTensor(ref.name, ref.dtype, shape, content)


def _pieces(view: ModelView, ref: TensorRef, sizes: Mapping[str, int], keep: Keep, factor: float) -> Iterator[Tensor]:
    for piece in cut_pieces(view.checkpoint, ref, sizes, keep):
        yield piece if factor == 1 else (piece.double() * factor).to(piece.dtype)


def _stored(view: ModelView, ref: TensorRef) -> Stored:
    info = view.checkpoint.tensors[ref.name]
    return Stored(view.checkpoint.folder / info.file, info.start)


def _place(view: ModelView, ref: TensorRef) -> tuple[str, int]:
    info = view.checkpoint.tensors[ref.name]
    return info.file, info.start
