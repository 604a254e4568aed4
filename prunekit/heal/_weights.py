"""From trained parameters to the tensors of a checkpoint: names, types, and which of them changed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.checkpoint.reader import Checkpoint, torch_dtypes
from prunekit.checkpoint.writer import OutTensor, Stored, write_weights
from prunekit.core.errors import HealError
from prunekit.core.progress import NULL_PROGRESS, Progress

# As checkpoints of old call what transformers calls otherwise today.
_OLD = ((".gamma", ".weight"), (".beta", ".bias"))


def names_of(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter of the model for each tensor of its checkpoint that is one; tied ones lead to the same parameter.

    Raises:
        HealError: if a parameter is in no tensor, so that training would be lost.
    """
    prefix = f"{model.base_model_prefix}."
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    found = {}
    for name, info in checkpoint.tensors.items():
        today = name
        for old, new in _OLD:
            today = today.removesuffix(old) + new if today.endswith(old) else today
        wanted = (today, prefix + today, today.removeprefix(prefix))
        place = next((n for n in wanted if shapes.get(n) == info.shape), None)
        if place is not None:
            found[name] = place
    parameters = dict(model.named_parameters(remove_duplicate=False))
    there = {id(parameters[place]) for place in found.values()}
    lost = next((name for name, p in model.named_parameters() if id(p) not in there), None)
    if lost is not None:
        raise HealError(
            f"`{lost}` of the model is no tensor of its files",
            why="transformers makes it from tensors of other names or shapes",
            hint="this checkpoint cannot be healed here; save it anew with transformers first",
        )
    return found


def round_as_stored(model: Any, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Gives every parameter the value that its file can hold."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, place in names.items():
            stored = torch_dtypes()[checkpoint.tensors[name].dtype]
            parameters[place].copy_(parameters[place].to(stored))


def write_changed(
    checkpoint: Checkpoint,
    model: Any,
    names: Mapping[str, str],
    folder: Path,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress = NULL_PROGRESS,
) -> int:
    """Writes a checkpoint's weights anew, what training changed from the model and the rest from its files.

    Args:
        checkpoint: of the cut model.
        model: trained, values rounded as stored.
        names: as from `names_of`.
        folder: existing, without weights.
        max_shard_bytes: largest weight file.
        progress: told of bytes.
    Returns:
        How many tensors changed.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors, changed = [], 0
    in_order = sorted(checkpoint.tensors.items(), key=lambda entry: (entry[1].file, entry[1].start))
    for name, info in in_order:
        tensor = OutTensor(name, info.dtype, info.shape, Stored(checkpoint.folder / info.file, info.start))
        if name in names:
            now = parameters[names[name]].detach()
            stored = torch_dtypes()[info.dtype]
            if not torch.equal(now.to("cpu", stored), checkpoint.read(name)):
                changed += 1
                tensor = OutTensor(name, info.dtype, info.shape, partial(_made, now, stored))
        tensors.append(tensor)
    write_weights(folder, tensors, max_shard_bytes, progress)
    return changed


def _made(values: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [values.to("cpu", dtype)]
