"""Folders that are made once and read ever after: converted GGUF files, unpacked models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from prunekit.core.errors import CheckpointError
from prunekit.core.files import atomic_folder


def cache_folder(cache: Path | None = None) -> Path:
    """The folder given, `$PRUNEKIT_CACHE`, or `~/.cache/prunekit`."""
    if cache is not None:
        return Path(cache)
    named = os.environ.get("PRUNEKIT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "prunekit"


def cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """The cached checkpoint `folder`, made first when it is missing or damaged.

    Processes that ask for the same folder at the same time wait for the first one; what it makes appears whole or
    not at all.

    Args:
        make: writes the checkpoint into the empty folder it is given.
    Raises:
        CheckpointError: if the cache cannot be written to.
    """
    if is_sound(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not is_sound(folder):
                with atomic_folder(folder, overwrite=True) as fresh:
                    make(fresh)
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the cache folder `{folder.parent}`",
            why=error.strerror or str(error),
            hint="set PRUNEKIT_CACHE to a folder with room that you may write to",
        ) from error
    return folder


def is_sound(folder: Path) -> bool:
    """Whether a folder holds a checkpoint whose headers and sizes are right."""
    from prunekit.checkpoint.reader import Checkpoint

    if not folder.is_dir():
        return False
    try:
        Checkpoint.open(folder)
    except CheckpointError:
        return False
    return True
