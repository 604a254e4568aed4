"""How a measurement is written: its options, checked against its class, and the name that its figures go by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prunekit.core.errors import PrunekitError, UsageError
from prunekit.core.recipe_fields import knob_problems
from prunekit.core.recipe_problems import Problem, near
from prunekit.core.registry import TASKS
from prunekit.core.yaml_lines import KeyPath, read_value

# The option that says what is measured on; a value without a name fills it.
_SUBJECT = "data"
_SENSES = ("min", "max")


def task_problems(name: Any, options: Mapping[str, Any], path: KeyPath) -> list[Problem]:
    """What is wrong with a task's name and options.

    Args:
        name: as typed.
        options: by name.
        path: where the task stands in a recipe.
    """
    names = TASKS.names()
    if name not in names:
        hint = near(name, names) or f"there are: {', '.join(names)}"
        return [Problem(f"no task named `{name}`", (*path, "task"), hint=hint)]
    try:
        cls = TASKS.get(name)
    except PrunekitError as error:
        return [Problem(error.what, (*path, "task"), why=error.why, hint=error.hint)]
    return knob_problems(cls, options, path)


def make_task(name: str, options: Mapping[str, Any]) -> Any:
    """The task that a name and sound options stand for."""
    from pydantic import TypeAdapter

    return TypeAdapter(TASKS.get(name)).validate_python(dict(options))


def subject_option(cls: type) -> str | None:
    """The option that says what a task measures on, filled by a value without a name; None where it has none."""
    return _SUBJECT if _SUBJECT in getattr(cls, "__pydantic_fields__", {}) else None


def label_of(name: str, task: Any, given: str | None = None) -> str:
    """What a task's figures go by: the name given, the stem of its data, or its own name.

    `multiple_choice` on `mc/hellaswag.jsonl` goes by `hellaswag`, `arithmetic` by `arithmetic`.
    """
    if given:
        return given
    option = subject_option(type(task))
    if option is None:
        return name
    # A text serves several tasks; its name would not say which.
    if name in ("perplexity", "repetition"):
        return name
    return Path(getattr(task, option)).stem


def split_limit(key: str, labels: Iterable[str]) -> tuple[str, str] | None:
    """Label and figure of an `expect.figures` key: `arc_easy.acc_min` gives `arc_easy` and `acc`.

    Args:
        key: as typed.
        labels: of the tasks that are measured; one of them that begins the key is the label, though it holds dots.
    Returns:
        None where the key has another form.
    """
    name, _, sense = key.rpartition("_")
    known = next((label for label in labels if name.startswith(f"{label}.")), name.partition(".")[0])
    figure = name[len(known) + 1 :]
    return (known, figure) if known and figure and sense in _SENSES else None


def parts(text: str) -> list[str]:
    """Parts of what is typed between commas that stand outside brackets: `power,layers=[2, 3]` has two."""
    found, depth = [""], 0
    for sign in text:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth <= 0:
            found.append("")
        else:
            found[-1] += sign
    return found


def option_values(typed: Iterable[str], at: str) -> dict[str, Any]:
    """Values by name of `option=value` texts, each read as YAML.

    Args:
        typed: the texts.
        at: where they stand, for messages.
    Raises:
        UsageError: for one of another form, a value that cannot be read, or a name that is given twice.
    """
    found: dict[str, Any] = {}
    for part in typed:
        key, equals, value = part.partition("=")
        name = key.strip()
        if not equals or not name:
            raise UsageError(f"`{part}` is not option=value", hint="for example limit=100", at=at)
        if name in found:
            raise UsageError(f"`{name}` is given twice", at=at)
        try:
            found[name] = read_value(value)
        except ValueError as error:
            raise UsageError(f"the value of `{part}` cannot be read", why=str(error), at=at) from error
    return found
