"""Tasks as the command line names them, one by one or as a suite."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from prunekit.core.errors import UsageError
from prunekit.core.registry import TASKS
from prunekit.core.task_options import label_of, make_task, option_values, parts, subject_option, task_problems
from prunekit.evaluate.subject import KINDS, Kind
from prunekit.evaluate.task import Task

_QUICK_TEXT = (
    "perplexity,sequences=8,length_tokens=256",
    "multiple_choice:arc_easy,limit=50",
    "cloze:lambada,limit=50",
    "copying,limit=20",
    "brackets,limit=20",
    "arithmetic,limit=20",
    "counting,limit=20",
    "lists,limit=20",
    "passkey,lengths=[256, 512],limit=4",
    "repetition,limit=8,new_tokens=48",
    "latency,prompt_tokens=128,new_tokens=16,repeats=2",
    "memory",
)
_FULL_TEXT = (
    "perplexity,sequences=80,length_tokens=512",
    "perplexity,name=perplexity_sliding,sequences=160,length_tokens=512,stride_tokens=256",
    "multiple_choice:arc_easy",
    "cloze:lambada",
    "copying",
    "brackets",
    "arithmetic",
    "counting",
    "lists",
    "passkey,lengths=[256, 1024, 4096]",
    "repetition,limit=50,new_tokens=128",
    "latency,prompt_tokens=512,new_tokens=64,repeats=5",
    "memory,prompt_tokens=512",
)
_ENCODER = ("probe:subjectivity_dev", "latency,batch=8,prompt_tokens=64", "memory,batch=8,prompt_tokens=64")
_IMAGES = ("latency,batch=8", "memory,batch=8")
SUITES: dict[str, dict[Kind, tuple[str, ...]]] = {
    "quick": {"text": _QUICK_TEXT, "sentences": _ENCODER, "images": _IMAGES},
    "full": {"text": _FULL_TEXT, "sentences": _ENCODER, "images": _IMAGES},
}


@dataclass(frozen=True)
class Asked:
    """A task that is to be measured.

    Args:
        name: in the registry.
        label: what its figures go by.
        task: with its options.
    """

    name: str
    label: str
    task: Task

    def options(self) -> dict[str, Any]:
        """All options with their values, defaults too."""
        return dataclasses.asdict(self.task)  # type: ignore[call-overload]


def asked(name: str, options: Mapping[str, Any], label: str | None = None, at: str = "") -> Asked:
    """A task by name and options.

    Raises:
        UsageError: with the first thing that is wrong.
    """
    for problem in task_problems(name, options, ()):
        raise UsageError(problem.what, why=problem.why, hint=problem.hint, at=at)
    task = make_task(name, options)
    return Asked(name, label_of(name, task, label), task)


def parse_task(text: str, limit: int | None = None) -> Asked:
    """A task as `--task` takes it: `NAME`, `NAME:DATA` or `NAME:DATA,option=value,...`; `name=` renames its figures.

    Args:
        text: as typed; values are read as YAML, so that `lengths=[256, 1024]` is a list.
        limit: most examples, where the task has such an option; a smaller one in the text stays.
    Raises:
        UsageError: for an unknown task or option, or a value of the wrong type.
    """
    at = f"--task {text}"
    head, *rest = parts(text)
    name, colon, subject = head.partition(":")
    options: dict[str, Any] = {}
    if name in TASKS.names() and colon:
        option = subject_option(TASKS.get(name))
        if option is None:
            raise UsageError(f"`{name}` takes no data", hint=f"write `{name}`, options behind commas", at=at)
        options[option] = subject
    for key, value in option_values(rest, at).items():
        if key in options:
            raise UsageError(f"`{key}` is given twice", at=at)
        options[key] = value
    label = options.pop("name", None)
    if label is not None and not isinstance(label, str):
        raise UsageError(f"`name: {label}` must be text", at=at)
    return limited(asked(name, options, label, at), limit)


def limited(made: Asked, limit: int | None) -> Asked:
    """The same task over at most so many examples."""
    field = made.task.limits
    if limit is None or not field:
        return made
    if limit < 1:
        raise UsageError(f"`--limit {limit}` must be at least 1")
    held = getattr(made.task, field)
    options = {**made.options(), field: limit if held is None else min(held, limit)}
    return asked(made.name, options, made.label, at=f"--limit {limit}")


def suite(name: str, kind: Kind, positions: int | None, limit: int | None = None) -> list[Asked]:
    """Tasks of a suite for a kind of model.

    Args:
        name: `quick` or `full`.
        kind: of the model.
        positions: longest text it reads; windows become as short, and longer pass keys are left out.
        limit: most examples of each task.
    Raises:
        UsageError: for another name, or a kind of model that no task reads.
    """
    if name not in SUITES:
        near = get_close_matches(name, SUITES, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(SUITES)}"
        raise UsageError(f"no suite `{name}`", hint=hint)
    if kind not in SUITES[name]:
        raise UsageError(f"the suite `{name}` has no task for {KINDS[kind]}")
    fitted = [_fitted(parse_task(text, limit), positions) for text in SUITES[name][kind]]
    return [made for made in fitted if made is not None]


def require_distinct(tasks: Sequence[Asked]) -> None:
    """Refuses tasks whose figures could not be told apart.

    Raises:
        UsageError: naming the label.
    """
    labels = [made.label for made in tasks]
    for label in labels:
        if labels.count(label) > 1:
            hint = "give one of them another with `name=`"
            raise UsageError(f"two tasks go by the name `{label}`", hint=hint)


def _fitted(made: Asked, positions: int | None) -> Asked | None:
    options = made.options()
    if positions is None:
        return made
    if made.name == "perplexity":
        options["length_tokens"] = min(options["length_tokens"], positions)
        if options["stride_tokens"] is not None:
            options["stride_tokens"] = min(options["stride_tokens"], options["length_tokens"] - 1)
    elif made.name == "passkey":
        options["lengths"] = [length for length in options["lengths"] if length + 16 <= positions]
        if not options["lengths"]:
            return None
    elif "prompt_tokens" in options:
        options["prompt_tokens"] = min(options["prompt_tokens"], max(1, positions - options["new_tokens"]))
    return asked(made.name, options, made.label)
