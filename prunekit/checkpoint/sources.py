"""What a recipe may name as its model: a folder, a GGUF file, a packaged model or a hub id; each becomes a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from prunekit.checkpoint import pickles
from prunekit.checkpoint.cache import cache_folder, cached
from prunekit.checkpoint.dinov2_onnx import write_dinov2
from prunekit.checkpoint.gguf import converted, is_gguf
from prunekit.checkpoint.hub import downloaded
from prunekit.checkpoint.packaged import PACKAGED, packaged_file, write_unpacked
from prunekit.checkpoint.whisper_ct2 import write_whisper
from prunekit.core.errors import CheckpointError, UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


@dataclass(frozen=True)
class ResolvedSource:
    """A model on this disk.

    Args:
        folder: Hugging Face folder with safetensors weights; never written to.
        name: short name for titles and file names.
        revision: commit of a hub model, else None.
    """

    folder: Path
    name: str
    kind: Literal["folder", "gguf", "hub", "packaged"]
    revision: str | None


def resolve(
    source: str, revision: str | None = None, cache: Path | None = None, progress: Progress = NULL_PROGRESS
) -> ResolvedSource:
    """The folder that a source stands for; converts, unpacks or downloads where it must.

    Args:
        source: folder, GGUF file, name of a packaged model, or hub id `owner/name`; what exists on disk comes first.
        revision: branch, tag or commit of a hub id.
        cache: for converted and unpacked models; None takes `$PRUNEKIT_CACHE` or `~/.cache/prunekit`.
    Raises:
        CheckpointError: if there is no such model, or it cannot be read.
        UsageError: if a revision is given for anything but a hub id.
    """
    path = Path(source).expanduser()
    local = path.exists() or source in PACKAGED
    if local and revision is not None:
        hint = f"leave out the revision `{revision}`"
        raise UsageError(f"`{source}` has no revisions", why="only hub ids have", hint=hint)
    if path.is_dir():
        pickles.require_safetensors(path)
        return ResolvedSource(path, path.resolve().name, "folder", None)
    if path.is_file():
        return ResolvedSource(_of_file(path, cache_folder(cache), progress), path.stem, "gguf", None)
    if source in PACKAGED:
        return ResolvedSource(_of_package(source, cache_folder(cache), progress), source, "packaged", None)
    if not _HUB_ID.fullmatch(source):
        raise _unknown(source, path)
    folder, commit = downloaded(source, revision, progress)
    return ResolvedSource(folder, source, "hub", commit)


def _of_file(file: Path, cache: Path, progress: Progress) -> Path:
    if is_gguf(file) or file.suffix == ".gguf":
        return converted(file, cache, progress=progress)
    if file.suffix in pickles.SUFFIXES:
        raise pickles.refusal(file.name, at=str(file))
    hint = f"give its folder: {file.parent}" if file.suffix in (".safetensors", ".json") else ""
    raise CheckpointError(f"`{file}` is no model", why="a model is a Hugging Face folder or a GGUF file", hint=hint)


def _of_package(name: str, cache: Path, progress: Progress) -> Path:
    file = packaged_file(name)
    if file.suffix == ".gguf":
        return converted(file, cache, progress=progress)
    write = {".onnx": write_dinov2, ".bin": write_whisper}.get(file.suffix, write_unpacked)
    return cached(cache / "packaged" / f"{name}-{PACKAGED[name].sha256[:16]}", lambda fresh: write(file, fresh))


def _unknown(source: str, path: Path) -> CheckpointError:
    near = [f"`{name}`" for name in get_close_matches(source.lower(), PACKAGED, n=1)]
    if path.parent.is_dir():
        beside = {file.name for file in path.parent.iterdir() if file.is_dir() or file.suffix == ".gguf"}
        near += [f"`{path.parent / name}`" for name in get_close_matches(path.name, sorted(beside), n=1, cutoff=0.8)]
    known = ", ".join(f"`{name}`" for name in PACKAGED)
    hint = f"did you mean {near[0]}?" if near else f"packaged models are {known}; hub ids read `owner/name`"
    return CheckpointError(f"no model `{source}`", why="there is no such folder, file or packaged model", hint=hint)
