"""Pydantic's findings in our words: what was typed, what is allowed, what was probably meant."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from prunekit.core.errors import PrunekitError
from prunekit.core.recipe_model import Recipe
from prunekit.core.recipe_problems import Problem, near, typed
from prunekit.core.yaml_lines import KeyPath

# What a recipe may come to say, and what does the nearest thing until then.
NOT_BUILT: dict[KeyPath, str] = {
    ("steps", "rewire"): "rewiring is not built yet; steps remove units",
}
_NOT_BUILT_VALUES = {
    ("layout", "masked"),
}
_SHAPES = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "dataclass": "a mapping",
}


def field_problems(data: Mapping[str, Any]) -> tuple[list[Problem], Recipe | None]:
    """Every unknown key, missing key, wrong type and value out of range.

    Args:
        data: the recipe as read.
    Returns:
        Problems, and the recipe where there are none.
    """
    try:
        return [], Recipe.model_validate(data)
    except ValidationError as error:
        # Pydantic counts only sound items against a least length.
        entries = [e for e in _entries(error) if e["type"] != "too_short" or not e["input"]]
    problems = [_problem(entry, _known_at(tuple(entry["loc"]))) for entry in entries]
    rewired = {p.path[:2] for p in problems if len(p.path) == 3 and p.path[2] == "rewire"}
    # A rewire step lacks the keys of a removal; that it is not built says all.
    return [p for p in problems if p.path[:2] not in rewired or p.path[2:] == ("rewire",)], None


def knob_problems(cls: type, knobs: Mapping[str, Any], path: KeyPath, shared: Sequence[str] = ()) -> list[Problem]:
    """The same for the knobs of a method's class; `shared` are keys that may stand beside any method's knobs."""
    try:
        errors = _knob_errors(cls, knobs)
    except PrunekitError as error:
        return [Problem(error.what, path, why=error.why, hint=error.hint)]
    known = [name for name in getattr(cls, "__pydantic_fields__", {}) if not name.startswith("_")] + list(shared)
    by_knob: dict[Any, list[dict[str, Any]]] = {}
    for entry in errors:
        by_knob.setdefault(entry["loc"][:1], []).append(entry)
    return [_problem(_one_of(entries, path), known) for entries in by_knob.values()]


def _one_of(entries: list[dict[str, Any]], path: KeyPath) -> dict[str, Any]:
    """The finding itself, or one finding for a value that fits none of the types its knob may have."""
    loc = (*path, *entries[0]["loc"][:1])
    if len(entries) == 1:
        return {**entries[0], "loc": loc}
    rules = [_problem({**entry, "loc": loc}, []) for entry in entries]
    reasons = [rule.what.rpartition("` ")[2] if not rule.why else rule.why for rule in rules]
    return {**entries[0], "type": "fits_none", "loc": loc, "msg": "fits none: " + ", or ".join(reasons)}


def _knob_errors(cls: type, knobs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pydantic's errors. The detour through JSON keeps types strict while a list still fills a tuple."""
    infinite = list(_not_finite(knobs, ()))
    finite = {key: value for key, value in knobs.items() if all(entry["loc"][0] != key for entry in infinite)}
    try:
        TypeAdapter(cls).validate_json(json.dumps(finite), strict=True)
    except ValidationError as error:
        return infinite + _entries(error)
    return infinite


def _entries(error: ValidationError) -> list[dict[str, Any]]:
    return [dict(entry) for entry in error.errors(include_url=False)]


def _not_finite(data: Any, path: KeyPath) -> Iterator[dict[str, Any]]:
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        yield {"type": "finite_number", "loc": path, "input": data, "msg": "", "ctx": {}}
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _not_finite(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _not_finite(value, (*path, index))


def _known_at(path: KeyPath) -> list[str]:
    """Keys that the recipe has beside the last key of a path."""
    model: Any = Recipe
    for key in path[:-1]:
        if isinstance(key, str):
            model = next((f.annotation for n, f in _fields(model) if n == key), None)
        model = _model_inside(model)
        if model is None:
            return []
    return [name for name, _ in _fields(model)]


def _fields(model: Any) -> list[tuple[str, Any]]:
    return [(field.alias or name, field) for name, field in model.model_fields.items()]


def _model_inside(annotation: Any) -> Any:
    """The model in `Model`, `Model | None` or `tuple[Model, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return next((m for a in get_args(annotation) if (m := _model_inside(a)) is not None), None)
    return None


def _problem(error: Mapping[str, Any], known: list[str]) -> Problem:
    """One finding in our words. `known`: the keys allowed beside the last one of its path."""
    kind, path, value = error["type"], tuple(error["loc"]), error.get("input")
    key = next((part for part in reversed(path) if isinstance(part, str)), "recipe")
    context = error.get("ctx") or {}
    said = f"`{key}: {typed(value)}`"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        reason = NOT_BUILT.get(tuple(part for part in path if isinstance(part, str)))
        if reason:
            return Problem(f"`{key}` is not built yet", path, why=reason, hint=_listed("known here", known))
        hint = near(key, known) or _listed("known here", known) or "this method has no knobs"
        return Problem(f"unknown key `{key}`", path, hint=hint)
    if kind in ("missing", "missing_argument"):
        return Problem(f"`{key}` is missing", path, hint=_MISSING.get(key, ""))
    if kind == "literal_error":
        return _not_allowed(said, path, value, str(context.get("expected", "")))
    if kind in ("value_error", "assertion_error"):
        return Problem(_rule(kind, context, error), path)
    if kind == "string_pattern_mismatch":
        return Problem(f"{said} is not allowed", path, hint=_PATTERNS.get(key, f"must match {context.get('pattern')}"))
    return Problem(f"{said} {_rule(kind, context, error)}", path, hint=_RANGES.get(key, "") if "than" in kind else "")


_MISSING = {
    "task": "the name of what is measured, for example `{task: multiple_choice, data: arc_easy}`",
    "schema": "write `schema: 1` at the top",
    "model": "for example `model: {source: smollm2-135m-instruct}`",
    "source": "a folder, a hub id, a GGUF file or a packaged model's name",
    "steps": "a list of removals, each with `remove`, `by` and `budget`",
    "remove": "the kind of unit that goes, for example `remove: blocks`",
    "by": "the method that chooses, for example `by: {score: magnitude}`",
    "budget": "how much goes, for example `budget: {remove: 0.2, of: params}`",
    "prompt": "the text that both models continue",
}
_RANGES = {"remove": "the fraction that goes: 20 % is written 0.2"}
_PATTERNS = {"device": "allowed: auto, cpu, mps, cuda, cuda:1"}


def _not_allowed(said: str, path: KeyPath, value: Any, expected: str) -> Problem:
    words = {"True": "true", "False": "false", "None": "null"}
    parts = [part.strip().strip("'") for part in expected.replace(" or ", ", ").split(",")]
    allowed = [words.get(part, part) for part in parts if part]
    listed = _listed("allowed", allowed)
    names = [part for part in path if isinstance(part, str)]
    if names and (names[-1], value) in _NOT_BUILT_VALUES:
        return Problem(f"{said} is not built yet", path, hint=listed)
    if names[-1:] == ["remove"] and value == "vocab":
        hint = "write `vocab: {data: wikitext2, coverage: 1.0}` beside `steps`"
        return Problem("the vocabulary is a section of its own", path, hint=hint)
    if names == ["schema"]:
        return Problem(f"{said} is not a version this prunekit reads", path, hint=listed)
    return Problem(f"{said} is not allowed", path, why=listed, hint=near(value, allowed))


def _rule(kind: str, context: Mapping[str, Any], error: Mapping[str, Any]) -> str:
    bounds = {"greater_than_equal": ("at least", "ge"), "greater_than": ("above", "gt")}
    bounds |= {"less_than_equal": ("at most", "le"), "less_than": ("below", "lt")}
    if kind in bounds:
        word, name = bounds[kind]
        return f"must be {word} {context[name]:g}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "finite_number":
        return "must be a finite number"
    if kind.partition("_")[0] in _SHAPES and kind.endswith(("_type", "_parsing", "_from_float", "_int")):
        return f"must be {_SHAPES[kind.partition('_')[0]]}"
    message = str(error.get("msg", "")).removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
    return message[:1].lower() + message[1:]


def _listed(word: str, names: list[str]) -> str:
    return f"{word}: {', '.join(names)}" if names else ""
