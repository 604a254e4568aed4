"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prunekit.core.errors import UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress

_CHUNK = 1 << 20
# What a folder must hold for `overwrite` to delete it: someone's home folder given by mistake holds none of these.
_OURS = ("config.json", "prunekit.json", "model.onnx", "*.safetensors", "*.gguf")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_files(
    folder: Path, names: Sequence[str], task_name: str = "digesting", progress: Progress = NULL_PROGRESS
) -> dict[str, str]:
    """SHA-256 of files of a folder by their names, in the order given.

    Args:
        task_name: what the progress is called; it is shown as files.
    """
    found = {}
    with progress.task(task_name, total=len(names), unit="files") as task:
        for name in names:
            found[name] = sha256_file(folder / name)
            task.advance(1)
    return found


def write_text(path: Path, text: str) -> None:
    """Writes a file in one step: a reader sees the old content or the new, never a part."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON in one step, indented, keys in the order given."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def require_free_folder(target: Path, overwrite: bool) -> None:
    """Fails where `atomic_folder` would, for a check before expensive work.

    Raises:
        UsageError: if the target is a file, is a folder with files that may not be replaced, or cannot be made.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"`{target}` is not a folder", hint="give another name")
    above = target.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"`{target}` cannot be made", why=f"`{above}` is no folder that may be written to")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"`{target}` exists", hint="give another name, or --overwrite to replace it")
    if not any(any(target.glob(name)) for name in _OURS):
        raise UsageError(
            f"`{target}` is not replaced",
            why="it does not look like a model folder",
            hint="give another name, or delete it yourself",
        )


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside the target that takes its place when the `with` block ends well, and is gone otherwise.

    What a killed run of the same target left behind is cleared first.

    Raises:
        UsageError: as `require_free_folder`, before anything is made.
    """
    target = Path(target)
    require_free_folder(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(target)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.part")
    fresh.mkdir()
    try:
        yield fresh
        _put_in_place(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _put_in_place(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear_leftovers(target: Path) -> None:
    """Removes unfinished folders of processes that are gone; puts a folder back that was being replaced."""
    for ending in ("old", "part"):
        for left in target.parent.glob(f".{target.name}.*.{ending}"):
            pid = left.name.split(".")[-2]
            if not pid.isdecimal() or _alive(int(pid)):
                continue
            if ending == "old" and not target.exists():
                left.rename(target)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    with suppress(ProcessLookupError, OverflowError):
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        return True
    return False
