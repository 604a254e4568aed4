"""Rows of a JSON Lines file, checked line by line; some sets come with prunekit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from prunekit.core.errors import UsageError

# What ships in the folder `data`, with its licences beside it.
PACKAGED = ("arc_easy", "lambada", "subjectivity_dev", "subjectivity_train")


@dataclass(frozen=True)
class Row:
    """One line of a file.

    Args:
        at: `file:line`, for messages.
        fields: what it holds.
    """

    at: str
    fields: Mapping[str, Any]

    def text(self, key: str, empty: bool = False) -> str:
        """A field that holds text.

        Raises:
            UsageError: if it is missing, no text, or blank where it may not be.
        """
        value = self.fields.get(key)
        if not isinstance(value, str):
            raise self.wrong(f"`{key}` must be text", why=_found(self.fields, key))
        if not empty and not value.strip():
            raise self.wrong(f"`{key}` is empty")
        return value

    def texts(self, key: str, least: int = 2) -> tuple[str, ...]:
        """A field that holds a list of texts, none of them blank.

        Raises:
            UsageError: if it is missing, no list of texts, too short, or holds an empty text.
        """
        value = self.fields.get(key)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.wrong(f"`{key}` must be a list of texts", why=_found(self.fields, key))
        if len(value) < least:
            raise self.wrong(f"`{key}` has {len(value)} entries", why=f"at least {least} are needed")
        for number, entry in enumerate(value):
            if not entry.strip():
                raise self.wrong(f"`{key}` holds an empty text", why=f"entry {number}, counted from 0")
        return tuple(value)

    def label(self, below: int) -> int:
        """The field `label`: a whole number from 0.

        Raises:
            UsageError: if it is missing, no whole number or out of range.
        """
        value = self.fields.get("label")
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong("`label` must be a whole number", why=_found(self.fields, "label"))
        if not 0 <= value < below:
            raise self.wrong(f"`label: {value}` is out of range", why=f"there are {below} choices, counted from 0")
        return value

    def number(self, key: str) -> float:
        """A field that holds a number.

        Raises:
            UsageError: if it is missing or no finite number.
        """
        value = self.fields.get(key)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or value != value
            or abs(value) == float("inf")
        ):
            raise self.wrong(f"`{key}` must be a number", why=_found(self.fields, key))
        return float(value)

    def wrong(self, what: str, why: str = "", hint: str = "") -> UsageError:
        """An error that names this line."""
        return UsageError(what, why=why, hint=hint, at=self.at)


def read_rows(name_or_path: str, limit: int | None = None) -> list[Row]:
    """Rows of a packaged set or a .jsonl file; blank lines are passed over.

    Args:
        name_or_path: `arc_easy`, `lambada`, `subjectivity_train`, `subjectivity_dev`, or a file.
        limit: rows read at most, from the start; None reads all.
    Raises:
        UsageError: when there is no such file, a line is no JSON object, or there is no row.
    """
    text = _packaged(name_or_path) if name_or_path in PACKAGED else _read(name_or_path)
    rows: list[Row] = []
    # Only line feeds end a record: JSON strings may hold the other characters that splitlines() would split at.
    for number, line in enumerate(text.split("\n"), start=1):
        if limit is not None and len(rows) == limit:
            break
        if not line.strip():
            continue
        at = f"{name_or_path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError("a line is not JSON", why=str(error), at=at) from error
        if not isinstance(value, dict):
            raise UsageError("a line is no JSON object", why="each line holds one row: {...}", at=at)
        rows.append(Row(at, value))
    if not rows:
        raise UsageError(f"`{name_or_path}` holds no rows")
    return rows


def _packaged(name: str) -> str:
    return (files("prunekit.evaluate") / "data" / f"{name}.jsonl").read_text(encoding="utf-8")


def _read(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        close = get_close_matches(name, PACKAGED, n=1)
        why = f"rows are a .jsonl file or one of {', '.join(PACKAGED)}"
        raise UsageError(f"no rows named `{name}`", why=why, hint=f"did you mean `{close[0]}`?" if close else "")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"`{name}` is not text", why=f"byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise UsageError(f"`{name}` cannot be read", why=error.strerror or str(error)) from error


def _found(fields: Mapping[str, Any], key: str) -> str:
    if key not in fields:
        names = ", ".join(fields) if fields else "nothing"
        return f"the row has {names[:200]}"
    return f"it is {json.dumps(fields[key])[:80]}"
