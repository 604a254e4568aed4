"""How a pattern of the sparse runtime is written: its options, checked against its class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from prunekit.core.errors import PrunekitError
from prunekit.core.recipe_fields import knob_problems
from prunekit.core.recipe_problems import Problem, near
from prunekit.core.recipe_runtime import SHARED
from prunekit.core.registry import PATTERNS
from prunekit.core.yaml_lines import KeyPath

# Formats that hold one graph for every input, which is all a pattern by position needs.
_GRAPHS = ("onnx", "genai")


def runtime_problems(data: Any, formats: Any = None) -> list[Problem]:
    """What is wrong with the pattern of a recipe's `runtime` key, as read.

    Args:
        data: what stands behind the key.
        formats: what stands behind `export.formats`.
    """
    if not isinstance(data, Mapping):
        return []
    short = "pattern" in data
    raw: Any = data if short else data.get("attention")
    path: KeyPath = ("runtime",) if short else ("runtime", "attention")
    if not isinstance(raw, Mapping) or not isinstance(raw.get("pattern"), str):
        return []
    options = {key: value for key, value in raw.items() if key not in ("pattern", *SHARED)}
    name = raw["pattern"]
    problems = pattern_problems(name, options, path)
    graphs = [kind for kind in formats if kind in _GRAPHS] if isinstance(formats, list) else []
    if not problems and graphs and is_scored(PATTERNS.get(name)):
        why = "it chooses keys by score at every call, and the graph would be one for all"
        hint = "leave the format out, or choose a pattern that goes by position"
        problems.append(Problem(f"`{graphs[0]}` cannot hold the pattern `{name}`", (*path, "pattern"), why, hint))
    return problems


def is_scored(pattern: object) -> bool:
    """Whether a pattern or its class chooses by score instead of by position."""
    return hasattr(pattern, "prompt_lists")


def pattern_problems(name: str, options: Mapping[str, Any], path: KeyPath = ()) -> list[Problem]:
    """What is wrong with a pattern's name and options.

    Args:
        name: as typed.
        options: by name.
        path: where they stand in a recipe.
    """
    names = PATTERNS.names()
    if name not in names:
        hint = near(name, names) or f"there are {', '.join(names)}"
        return [Problem(f"no pattern named `{name}`", (*path, "pattern"), hint=hint)]
    try:
        cls = PATTERNS.get(name)
    except PrunekitError as error:
        return [Problem(error.what, (*path, "pattern"), why=error.why, hint=error.hint)]
    allowed = [field.name for field in dataclasses.fields(cls)]
    problems = [
        Problem(
            f"`{key}` is no option of pattern `{name}`",
            (*path, key),
            hint=near(key, allowed) or f"there are {', '.join(allowed)}",
        )
        for key in options
        if key not in allowed
    ]
    return problems + knob_problems(cls, {k: v for k, v in options.items() if k in allowed}, path)
