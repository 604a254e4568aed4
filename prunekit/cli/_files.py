"""Checks on single output files of the verbs."""

from __future__ import annotations

from pathlib import Path

from prunekit.core.errors import UsageError


def require_free(file: Path, overwrite: bool) -> None:
    """Fails before any work where a file could not be written in the end.

    Raises:
        UsageError: if the file exists and may not be replaced, is a folder, or its folder does not exist.
    """
    if file.is_dir():
        raise UsageError(f"`{file}` is a folder", hint="give a file name")
    if file.exists() and not overwrite:
        raise UsageError(f"`{file}` exists", hint="give another name or --overwrite")
    if not file.parent.is_dir():
        raise UsageError(f"there is no folder `{file.parent}`", hint=f"mkdir -p {file.parent}")
