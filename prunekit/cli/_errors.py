"""Errors as a person or a program reads them."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import typer

from prunekit.core.errors import PrunekitError, UsageError


def show(error: PrunekitError, *, as_json: bool) -> None:
    """Prints an error: `error:`, `why:`, `hint:`, `at:` on stderr, or one JSON document on stdout.

    An error with exit code 3 comes after a result that already names what was missed, so stdout stays as it is.
    """
    if as_json and error.exit_code != 3:
        document: dict[str, Any] = {"error": _fields(error), "exit_code": error.exit_code}
        if problems := getattr(error, "problems", ()):
            document["problems"] = [{**_fields(p), "line": p.line or None} for p in problems]
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        return
    for part in getattr(error, "problems", ()) or (error,):
        sys.stderr.write(_text(part))


def from_typer(error: Exception, verb: str | None) -> PrunekitError:
    """An error of the command line parser in our words."""
    message = " ".join(str(error.format_message()).split())  # type: ignore[attr-defined]
    message, _, suggestion = message.partition("(Possible options:")
    message, _, meant = message.partition("Did you mean")
    message = re.sub(r"'([^' ]+)'", r"`\1`", message.strip().rstrip(".?"))
    message = re.sub(r": (--?[\w-]+)$", r": `\1`", message)
    near = meant.strip(" ?'") or suggestion.strip(" )")
    place = f"prunekit {verb} --help" if verb else "prunekit --help"
    hint = f"did you mean {near}? " if near else ""
    return UsageError(message[:1].lower() + message[1:], hint=f"{hint}`{place}` shows what there is")


def from_os(error: OSError) -> PrunekitError:
    """A full disk, a missing right and the like."""
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    return PrunekitError(reason, at=str(error.filename or ""))


def from_bug(error: Exception) -> PrunekitError:
    """Anything that no one foresaw."""
    what = f"unexpected {type(error).__name__}"
    return PrunekitError(what, why=str(error), hint="run again with --debug for the traceback, and report it")


def _fields(part: Any) -> dict[str, str]:
    return {"what": part.what, "why": part.why, "hint": part.hint, "at": part.at}


def _text(part: Any) -> str:
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    head = typer.style("error:", fg="red", bold=True) if colour else "error:"
    lines = [f"{head} {part.what}"]
    for name in ("why", "hint", "at"):
        if value := getattr(part, name):
            first, *more = str(value).splitlines()
            lines += [f"  {name}: {first}", *(f"    {line}" for line in more)]
    return "\n".join(lines) + "\n"
