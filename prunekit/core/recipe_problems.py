"""Problems of a recipe, and the one error that carries all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from prunekit.core.errors import RecipeError
from prunekit.core.yaml_lines import KeyPath


@dataclass(frozen=True)
class Problem:
    """One thing to put right.

    Args:
        what: lower case, one sentence, backticks round what the user typed.
        path: keys from the top to the place.
        why: the rule behind it.
        hint: the way out.
        at: where a person finds it: `file:line, key.path`.
        line: line in the file; 0 where there is none.
    """

    what: str
    path: KeyPath = ()
    why: str = ""
    hint: str = ""
    at: str = ""
    line: int = 0


# Problems that the short form of the error names; `problems` holds all.
_NAMED = 3


class InvalidRecipeError(RecipeError):
    """All problems of one recipe.

    Args:
        problems: at least one; order of the file.
        source: file name, or what else the recipe came from.
    """

    def __init__(self, problems: Sequence[Problem], source: str) -> None:
        first = problems[0]
        if len(problems) == 1:
            super().__init__(first.what, why=first.why, hint=first.hint, at=first.at)
        else:
            listed = "; ".join(f"{p.what} ({p.at})" for p in problems[:_NAMED])
            more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
            super().__init__(f"{len(problems)} problems in `{source}`", why=listed + more, at=source)
        self.problems = tuple(problems)


def near(name: Any, known: Iterable[str]) -> str:
    """``did you mean `wanda`?``, or an empty text where nothing is near."""
    close = get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else ""


def typed(value: Any) -> str:
    """A value as a person would have typed it, short enough for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(value) + "}" if len(value) < 4 else "{...}"
    if isinstance(value, list):
        return "[" + ", ".join(map(typed, value)) + "]" if len(value) < 4 else "[...]"
    text = f"{value:g}".replace("inf", ".inf").replace("nan", ".nan") if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dotted(path: KeyPath) -> str:
    """`steps.0.budget` for ("steps", 0, "budget")."""
    return ".".join(map(str, path))
