"""The `prunekit` command: every file in this folder without a leading underscore is a verb, imported when called."""

from __future__ import annotations

import ast
import importlib
import os
import shlex
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli import _errors, _interrupt
from prunekit.core.errors import PrunekitError, UsageError
from prunekit.core.ranks import ALONE, Ranks, joined

_FOLDER = Path(__file__).parent
_NOT_VERBS = {"main", "docs"}
# Commands that share their work where a launcher starts several processes.
_SHARED = ("prune", "plan", "score", "heal", "data score")
# The order in which a person meets them; verbs not named here follow by alphabet.
_ORDER = (
    "prune",
    "inspect",
    "score",
    "costs",
    "plan",
    "apply",
    "heal",
    "export",
    "verify",
    "reproduce",
    "evaluate",
    "compare",
    "report",
    "diagnose",
    "recipes",
    "methods",
    "explain",
)
_EPILOGUE = "Begin with: prunekit recipes list, then prunekit prune --recipe NAME --output DIR"


def verbs() -> list[str]:
    """Names of all verbs, from the files of this folder."""
    found = {file.stem for file in _FOLDER.glob("*.py") if not file.stem.startswith("_")} - _NOT_VERBS
    return [name for name in _ORDER if name in found] + sorted(found - set(_ORDER))


def summary(verb: str) -> str:
    """First line of a verb's docstring, read without importing its file."""
    tree = ast.parse((_FOLDER / f"{verb}.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == verb]
    return (ast.get_docstring(functions[0]) or "").partition("\n")[0] if functions else ""


def build(load: Collection[str]) -> typer.Typer:
    """The command line application.

    Args:
        load: verbs to import; the others are known by name and first line only.
    """
    app = typer.Typer(
        name="prunekit",
        help="Structural pruning of transformers: choose, cut, measure, export.",
        epilog=_EPILOGUE,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(_globals)
    for verb in verbs():
        short = summary(verb)
        if verb not in load:
            app.command(verb, short_help=short)(_not_loaded)
            continue
        module = importlib.import_module(f"prunekit.cli.{verb}")
        if isinstance(getattr(module, "app", None), typer.Typer):
            app.add_typer(module.app, name=verb, short_help=short)
        else:
            app.command(verb, short_help=short)(getattr(module, verb))
    return app


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Of several processes that a launcher started, all return the same and the first one prints.

    Args:
        argv: arguments without the program's name; None takes the process's own.
    Returns:
        0 done, 1 failed, 2 wrong usage or recipe, 3 an expectation missed, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    end = words.index("--") if "--" in words else len(words)
    called = _Called(
        # Allowed anywhere, so that it can be put behind the command that just failed.
        words=[word for place, word in enumerate(words) if word != "--debug" or place > end],
        verb=next((word for word in words[:end] if not word.startswith("-")), None),
        debug="--debug" in words[:end],
        json="--json" in words[:end],
    )
    try:
        with joined() as ranks:
            return _carried_out(called, ranks)
    except PrunekitError as error:
        return _failed(error, called, ALONE, error.exit_code)


@dataclass(frozen=True)
class _Called:
    """A command line.

    Args:
        words: without `--debug`.
        verb: None where there is none.
        debug: whether tracebacks are wanted.
        json: whether results are.
    """

    words: list[str]
    verb: str | None
    debug: bool
    json: bool


def _carried_out(called: _Called, ranks: Ranks) -> int:
    try:
        with _interrupt.watched(), _silent() if not ranks.first else nullcontext():
            code = _run(called, ranks)
            ranks.wait()
        return code
    except (KeyboardInterrupt, typer.Abort):
        # Caught inside a string that was being executed (dataclasses are made so), an interruption makes CPython end by
        # the signal whatever is returned here; executing another string clears that.
        exec("")
        sys.stderr.write("\n" * ranks.first)
        return _failed(_interrupted(), called, ranks, 130)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if called.debug:
            import traceback

            traceback.print_exc()
        shown = _readable(error, called.verb)
        return _failed(shown, called, ranks, shown.exit_code)


def _run(called: _Called, ranks: Ranks) -> int:
    known, verb, words = verbs(), called.verb, called.words
    if verb is not None and verb not in known and not _completing() and "completion" not in words[0]:
        raise _no_verb(verb, known)
    spoken = " ".join([word for word in words if not word.startswith("-")][: 2 if verb == "data" else 1])
    if ranks.size > 1 and spoken and spoken not in _SHARED:
        raise UsageError(
            f"`prunekit {spoken}` runs in one process",
            why=f"{ranks.size} were started",
            hint=f"start it without a launcher; these share their work: {', '.join(_SHARED)}",
        )
    app = build([name for name in known if name in (*words, *_completing())])
    code = app(args=words, prog_name="prunekit", standalone_mode=False)
    # Typer answers an interruption by this code, by Abort, or not at all, by version and place.
    if code == 130:
        raise KeyboardInterrupt
    _interrupt.check()
    return code if isinstance(code, int) else 0


@contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _failed(error: PrunekitError, called: _Called, ranks: Ranks, exit_code: int) -> int:
    """Shows an error, unless another rank has shown what was first, and gives the exit code of the run."""
    before = ranks.failed(exit_code)
    if before is None:
        _errors.show(error, as_json=called.json)
    return exit_code if before is None else before


def _readable(error: Exception, verb: str | None) -> PrunekitError:
    if isinstance(error, PrunekitError):
        return error
    # The parser's own errors have no public class that old and new Typer share; this method they all have.
    if hasattr(error, "format_message"):
        return _errors.from_typer(error, verb)
    if isinstance(error, OSError):
        return _errors.from_os(error)
    return _errors.from_bug(error)


def _interrupted() -> PrunekitError:
    return PrunekitError("interrupted", hint="nothing that looks finished was left; run the same command again")


def _no_verb(verb: str, known: list[str]) -> PrunekitError:
    near = get_close_matches(verb, known, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return UsageError(f"no command `{verb}`", hint=f"{hint}`prunekit --help` lists all {len(known)}")


def _completing() -> list[str]:
    """Words that a shell asks us to complete; empty when this is a real run."""
    if "_PRUNEKIT_COMPLETE" not in os.environ:
        return []
    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "prunekit"
    try:
        return shlex.split(typed) or ["prunekit"]
    except ValueError:
        return typed.split() or ["prunekit"]


def _not_loaded() -> None:
    """Stands for a verb that this run does not call."""


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"prunekit {version('prunekit')}")
        raise typer.Exit()


def _globals(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; allowed behind a command too.")] = False,
) -> None:
    """Structural pruning of transformers: choose, cut, measure, export."""


if __name__ == "__main__":
    sys.exit(main())
