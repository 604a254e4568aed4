"""What a verb prints: results on stdout, talk and progress on stderr."""

from __future__ import annotations

import json as json_module
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from prunekit.core.progress import NULL_PROGRESS, Progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Width of tables in a pipe or a file, where no terminal says how wide it is.
PIPE_COLUMNS = 100


class Output:
    """Where a verb prints.

    Args:
        json: the result is one JSON document instead of text for people.
        quiet: no talk and no progress; results stay.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self._errors: Console | None = None

    def talk(self, text: str) -> None:
        """One line on stderr about what happens now."""
        if not self.quiet:
            self._stderr().print(text, soft_wrap=True)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Bars on a terminal, lines elsewhere, nothing when quiet."""
        if self.quiet:
            yield NULL_PROGRESS
            return
        from prunekit.cli._progress import LineProgress, bars

        console = self._stderr()
        if console.is_terminal:
            with bars(console) as progress:
                yield progress
        else:
            yield LineProgress(self.talk)

    def result(self, renderable: RenderableType, data: Any) -> None:
        """The result on stdout.

        Args:
            renderable: text or rich table for people.
            data: JSON values of the same; infinities and NaN become null.
        """
        if self.json:
            sys.stdout.write(json_module.dumps(finite(data), indent=2, ensure_ascii=False) + "\n")
        else:
            _print(renderable)
        sys.stdout.flush()

    def written(self, path: Path) -> None:
        """The path a command wrote: last line on stdout; the JSON document already names it."""
        if not self.json:
            sys.stdout.write(f"{path}\n")

    def _stderr(self) -> Console:
        if self._errors is None:
            self._errors = console(sys.stderr)
        return self._errors


def _print(renderable: RenderableType) -> None:
    if isinstance(renderable, str):
        # YAML and the like, in which a line broken to fit the screen means something else.
        sys.stdout.write(renderable.rstrip("\n") + "\n")
        return
    screen = console(sys.stdout)
    if screen.is_terminal:
        screen.print(renderable)
        return
    # Tables fill their last column with blanks, which nobody wants in a file.
    with screen.capture() as captured:
        screen.print(renderable)
    sys.stdout.writelines(line.rstrip() + "\n" for line in captured.get().splitlines())


def console(stream: TextIO) -> Console:
    """Rich console that prints text as it is: no markup, no emoji codes, no coloured numbers."""
    from rich.console import Console

    width = None
    if not stream.isatty() and not os.environ.get("COLUMNS", "").isdecimal():
        width = PIPE_COLUMNS
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def finite(data: Any) -> Any:
    """The same values with infinities and NaN, which JSON does not have, as None."""
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return data
