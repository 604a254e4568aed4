"""Text by name or path: what ships with prunekit, a user's file, or a Hugging Face data set's folder."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from prunekit.core.errors import UsageError
from prunekit.core.files import sha256_file, sha256_files

# `wikitext2` is for calibration, `wikitext2_eval` for evaluation; they share no article.
PACKAGED = ("wikitext2", "wikitext2_eval")
_FORMS = "a packaged name (wikitext2, wikitext2_eval), a .txt or .jsonl file, or the folder of a saved data set"


def load_text(name_or_path: str) -> str:
    """The whole text that a name or a path stands for.

    Args:
        name_or_path: `wikitext2`, `wikitext2_eval`, a .txt file, a .jsonl file whose lines have a `text` field, or a
            folder written by the `save_to_disk` of Hugging Face datasets (column `text`, split `train` if there are
            several).
    Raises:
        UsageError: when there is no such text, or it cannot be read, or it is empty.
    """
    text = _packaged(name_or_path) if name_or_path in PACKAGED else _from_path(name_or_path)
    if not text.strip():
        raise UsageError(f"`{name_or_path}` holds no text")
    return text


def data_digest(name_or_path: str) -> str | None:
    """SHA-256 of what a name or a path stands for, of a folder over all its files; None where there is no such file."""
    if name_or_path in PACKAGED:
        return hashlib.sha256(_packaged(name_or_path).encode()).hexdigest()
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        return None
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    found = sha256_files(path, names)
    return hashlib.sha256("".join(f"{name}\0{value}\0" for name, value in found.items()).encode()).hexdigest()


def _packaged(name: str) -> str:
    return (files("prunekit.calibrate") / "data" / f"{name}.txt").read_text(encoding="utf-8")


def _from_path(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_dataset(path)
    if not path.is_file():
        close = difflib.get_close_matches(name, PACKAGED, n=1)
        raise UsageError(
            f"no text named `{name}`", hint=f"did you mean `{close[0]}`?" if close else "", why=f"data is {_FORMS}"
        )
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"`{name}` is not text that can be read", why=f"data is {_FORMS}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"`{name}` is not text", why=f"byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise UsageError(f"`{name}` cannot be read", why=error.strerror or str(error)) from error
    return "\n".join(_json_lines(text, name)) if path.suffix == ".jsonl" else text


def _json_lines(text: str, name: str) -> Iterator[str]:
    # Only line feeds end a record: JSON strings may hold the other characters that splitlines() would split at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UsageError("a line is not JSON", why=str(error), at=f"{name}:{number}") from error
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise UsageError("a line has no `text` field that holds a string", at=f"{name}:{number}")
        yield value["text"]


def _from_dataset(folder: Path) -> str:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise UsageError(
            f"`{folder}` is a folder, and reading data sets needs the package datasets",
            hint="pip install datasets, or give a .txt or .jsonl file",
        ) from error
    try:
        found: Any = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"`{folder}` is not a saved data set", why=" ".join(str(error).split()), hint="write it with save_to_disk()"
        ) from error
    if isinstance(found, DatasetDict):
        if "train" not in found and len(found) > 1:
            raise UsageError(
                f"`{folder}` has several splits and none is named train", hint=f"give one of: {_splits(folder, found)}"
            )
        found = found["train"] if "train" in found else next(iter(found.values()))
    if "text" not in found.column_names:
        raise UsageError(f"`{folder}` has no column `text`", why=f"its columns are {', '.join(found.column_names)}")
    return "\n".join(found["text"])


def _splits(folder: Path, found: Any) -> str:
    return ", ".join(str(folder / split) for split in found)
