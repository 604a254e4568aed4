"""What a method says about itself: summary, paper, evidence, knobs. Read from its class, written nowhere else."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from prunekit.core.recipe_model import REGISTRIES
from prunekit.core.registry import ATTENTIONS, GATES, HEALS, METRICS, REPAIRS, TASKS, Registry

# Roles that have a section of the recipe of their own.
SECTIONS = {"repair": "repair", "gate": "learn", "heal": "heal"}


@dataclass(frozen=True)
class Knob:
    """One knob of a method.

    Args:
        name: key in the recipe.
        type: as a person reads it: `js | kl`, `whole number`.
        default: as YAML; None where it must be given.
        meaning: from the docstring.
    """

    name: str
    type: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Card:
    """A method as `prunekit explain` and its page in the docs show it."""

    role: str
    name: str
    summary: str
    body: str
    status: str
    kinds: tuple[str, ...]
    needs: tuple[str, ...]
    paper: str
    evidence: str
    deviations: str
    knobs: tuple[Knob, ...]
    example: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The card as JSON values."""
        return dataclasses.asdict(self)


def method_names() -> list[tuple[str, str]]:
    """(role, name) of every method, scores first."""
    return [(role, name) for role, registry in registries().items() for name in registry.names()]


def registries() -> dict[str, Registry]:
    """All methods by role: what a step may name, what learns masks, what makes up for the cut, metrics of data."""
    after = {"gate": GATES, "repair": REPAIRS, "heal": HEALS, "attention": ATTENTIONS}
    return {**REGISTRIES, **after, "metric": METRICS}


def card(role: str, name: str) -> Card:
    """Card of one method.

    Args:
        role: `score`, `search`, `gate`, `repair`, `heal`, `attention` or `metric`.
        name: registry name.
    Raises:
        UsageError: if there is no such method.
    """
    cls = registries()[role].get(name)
    text = inspect.cleandoc(cls.__doc__ or "")
    summary, _, rest = text.partition("\n")
    return Card(
        role=role,
        name=name,
        summary=summary.strip(),
        body=_body(rest),
        status=getattr(cls, "status", "preview"),
        kinds=tuple(getattr(cls, "kinds", ())),
        needs=tuple(getattr(cls, "needs", ())),
        paper=_text(getattr(cls, "paper", "")),
        evidence=_text(getattr(cls, "evidence", "")),
        deviations=_text(getattr(cls, "deviations", "")),
        knobs=_knobs(cls, arguments(text)),
        example=dict(getattr(cls, "example", {})),
    )


@dataclass(frozen=True)
class TaskCard:
    """A task of `prunekit evaluate` as its reference shows it."""

    name: str
    summary: str
    body: str
    reads: tuple[str, ...]
    figures: tuple[str, ...]
    knobs: tuple[Knob, ...]


def task_card(name: str) -> TaskCard:
    """What a task's class says about it.

    Raises:
        UsageError: if there is no such task.
    """
    cls = TASKS.get(name)
    text = inspect.cleandoc(cls.__doc__ or "")
    summary, _, rest = text.partition("\n")
    # Where figures depend on the options, the class holds a property.
    figures = cls.figures if isinstance(cls.figures, tuple) else ()
    return TaskCard(name, summary.strip(), _body(rest), tuple(cls.reads), figures, _knobs(cls, arguments(text)))


def arguments(docstring: str) -> dict[str, str]:
    """Entries of the `Args:` section of a Google docstring, each on one line."""
    found: dict[str, str] = {}
    for line in _section(docstring, "Args").splitlines():
        entry = re.match(r"(\w+)(?: \([^)]*\))?: *(.*)", line)
        if entry:
            found[entry[1]] = entry[2].strip()
        elif found and line.strip():
            found[next(reversed(found))] += " " + line.strip()
    return found


_HEADS = ("Args", "Returns", "Raises", "Source", "Differs", "Attributes", "Example", "Examples", "Yields")


def _section(text: str, name: str) -> str:
    match = re.search(rf"^{name}:\s*\n((?:[ \t]+.*\n?|\n)*)", text + "\n", flags=re.MULTILINE)
    return inspect.cleandoc(match[1]) if match else ""


def _body(text: str) -> str:
    """Paragraphs between the summary and the first section, each on one line; lists keep theirs."""
    match = re.search(rf"^(?:{'|'.join(_HEADS)}):", text, flags=re.MULTILINE)
    body = (text[: match.start()] if match else text).strip("\n")
    return re.sub(r"(?<=\S)\n(?=[^\s\-*|])", " ", body).strip()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(map(str, value))


def _knobs(cls: type, meanings: Mapping[str, str]) -> tuple[Knob, ...]:
    hints = get_type_hints(cls)
    fields: Mapping[str, FieldInfo] = getattr(cls, "__pydantic_fields__", {})
    return tuple(
        Knob(
            name,
            type_text(hints[name]),
            None if field.is_required() else yaml_text(field.get_default(call_default_factory=True)),
            meanings.get(name, ""),
        )
        for name, field in fields.items()
        if not name.startswith("_")
    )


def yaml_text(value: Any) -> str:
    """A value on one line of YAML: `null`, `true`, `[a, b]`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(yaml_text, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {yaml_text(part)}" for key, part in value.items()) + "}"
    return str(value)


_WORDS = {Path: "path", int: "whole number", float: "number", str: "text", bool: "true | false", type(None): "null"}


def type_text(hint: Any) -> str:
    """A type as a person reads it: `a | b` for choices, `list of text` for tuples."""
    if hint in _WORDS:
        return _WORDS[hint]
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(map(yaml_text, parts))
    if origin in (Union, types.UnionType):
        return " | ".join(map(type_text, parts))
    if origin in (tuple, list):
        return f"list of {type_text(parts[0])}"
    if origin is dict:
        return "mapping"
    if hasattr(hint, "__metadata__"):
        return type_text(parts[0])
    return str(getattr(hint, "__name__", hint))


def example_use(entry: Card) -> tuple[str, str]:
    """Where a method is used, and how, with its `example` knobs: YAML of a recipe, or a metric's command."""
    if entry.role in SECTIONS:
        shared: dict[str, Any] = {} if entry.role == "repair" else {"data": "wikitext2", "steps": 200, "lr": 1e-4}
        if entry.role == "gate":
            shared = {**shared, "remove": list(entry.kinds[:2]), "budget": {"remove": 0.2}}
        written = yaml_text({"method": entry.name, **shared, **entry.example})
        return "in a recipe", f"{SECTIONS[entry.role]}: {written}\n"
    if entry.role == "attention":
        written = yaml_text({"method": entry.name, **entry.example})
        return "in a recipe", f"heal: {{method: distill, data: wikitext2, length_tokens: 512, attention: {written}}}\n"
    if entry.role == "metric":
        knobs = "".join(f" --set {name}={yaml_text(value)}" for name, value in entry.example.items())
        return "on the command line", f"prunekit data score DATASET --metric {entry.name}{knobs}\n"
    kind = entry.kinds[0] if entry.kinds else "blocks"
    by = yaml_text({entry.role: entry.name, **entry.example})
    return "in a recipe", f"steps:\n  - remove: {kind}\n    by: {by}\n    budget: {{remove: 0.2, of: params}}\n"
