"""Recipes: a pruning run as data, read from YAML with every problem reported at once.

`load_recipe` reads a file or a recipe that comes with prunekit, `parse_recipe` data in memory. Both check everything
that can be known without the model before any work begins.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunekit.core.errors import RecipeError, UsageError
from prunekit.core.recipe_check import combination_problems
from prunekit.core.recipe_evaluate import EXPECTATIONS as EXPECTATIONS
from prunekit.core.recipe_evaluate import KL as KL
from prunekit.core.recipe_evaluate import Embedding as Embedding
from prunekit.core.recipe_evaluate import Evaluate as Evaluate
from prunekit.core.recipe_evaluate import Expect as Expect
from prunekit.core.recipe_evaluate import Latency as Latency
from prunekit.core.recipe_evaluate import Perplexity as Perplexity
from prunekit.core.recipe_evaluate import Sample as Sample
from prunekit.core.recipe_fields import field_problems
from prunekit.core.recipe_files import recipe_path
from prunekit.core.recipe_model import Budget as Budget
from prunekit.core.recipe_model import Calibrate as Calibrate
from prunekit.core.recipe_model import Export as Export
from prunekit.core.recipe_model import Method as Method
from prunekit.core.recipe_model import Model as Model
from prunekit.core.recipe_model import Recipe as Recipe
from prunekit.core.recipe_model import Step as Step
from prunekit.core.recipe_problems import InvalidRecipeError as InvalidRecipeError
from prunekit.core.recipe_problems import Problem as Problem
from prunekit.core.recipe_problems import dotted, typed
from prunekit.core.recipe_schema import json_schema as json_schema
from prunekit.core.recipe_select import Select as Select
from prunekit.core.yaml_lines import MAX_BYTES, Document, KeyPath, read_value, read_yaml

_BARE_TEXT = (("evaluate", "perplexity"), ("evaluate", "kl"), ("evaluate", "embedding"))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, changed by overrides and checked.

    Args:
        path: a YAML file, or the name of a recipe that comes with prunekit.
        overrides: `--set` expressions such as `steps.0.budget.remove=0.25`; values are read as YAML.
    Raises:
        RecipeError: with all problems of the file, each with its line.
    """
    file = recipe_path(path)
    try:
        with open(file, "rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"`{file}` cannot be read", why=error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        what = f"`{file}` is not text"
        raise RecipeError(what, why=f"byte {error.start} is not UTF-8", hint="recipes are YAML") from error
    return _checked(read_yaml(text), overrides, str(file), in_file=True)


def parse_recipe(data: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "") -> Recipe:
    """The recipe that data in memory stands for, changed by overrides and checked.

    Args:
        data: mappings, lists and scalars as a YAML file would give them.
        overrides: `--set` expressions.
        source: what error messages call the recipe.
    Raises:
        RecipeError: with all problems.
    """
    return _checked(Document(copy.deepcopy(dict(data))), overrides, source, in_file=False)


def _checked(document: Document, overrides: Sequence[str], source: str, *, in_file: bool) -> Recipe:
    problems = [Problem(p.what, p.path, p.why, p.hint, _at(source, p.line, p.path), p.line) for p in document.problems]
    if isinstance(document.data, dict):
        data = document.data
        changed = {_override(data, expression): expression for expression in overrides}
        found, recipe = field_problems(data)
        problems += _placed([*found, *combination_problems(data)], document, changed, source, in_file)
        if recipe is not None and not problems:
            return recipe
    elif not problems:
        hint = "a recipe begins with `schema: 1`; `prunekit recipes show smollm2-demo` prints one"
        empty = document.data is None
        what = "the recipe is empty" if empty else "a recipe must be a mapping of keys"
        problems.append(Problem(what, hint=hint, at=_at(source, 1, ())))
    # In the order of the file; what an override brought has no line and comes last.
    problems.sort(key=lambda problem: (problem.at.startswith("--set "), problem.line))
    raise InvalidRecipeError(problems, source or "the recipe")


def _placed(
    found: Sequence[Problem], document: Document, changed: Mapping[KeyPath, str], source: str, in_file: bool
) -> list[Problem]:
    """The problems with their places."""
    placed = []
    for problem in found:
        expression = next((e for path, e in changed.items() if _brought(path, problem.path, document)), None)
        line = document.line(problem.path) if in_file and expression is None else 0
        at = f"--set {expression}" if expression is not None else _at(source, line, problem.path)
        placed.append(Problem(problem.what, problem.path, problem.why, problem.hint, at, line))
    return placed


def _brought(changed: KeyPath, place: KeyPath, document: Document) -> bool:
    """Whether an override wrote a problem's place, or made the mapping that the place belongs to."""
    shared = 0
    while shared < min(len(changed), len(place)) and changed[shared] == place[shared]:
        shared += 1
    if shared == len(changed):
        return True
    return bool(document.lines) and shared > 0 and place[:shared] not in document.lines


def _at(source: str, line: int, path: KeyPath) -> str:
    place = f"{source}:{line}" if source and line else source
    return ", ".join(part for part in (place, dotted(path)) if part)


def _override(data: dict[str, Any], expression: str) -> KeyPath:
    """Writes one `--set` expression into the data and returns the path it changed.

    Raises:
        UsageError: for an expression that is not path=value, or a path that leads through a scalar or past a list.
    """
    name, equals, text = expression.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"`--set {expression}` is not path=value", hint="for example steps.0.budget.remove=0.25")
    try:
        value = read_value(text)
    except ValueError as error:
        raise UsageError(f"the value of `--set {expression}` cannot be read", why=str(error)) from error
    place: Any = data
    path: KeyPath = ()
    for name in keys[:-1]:
        key: Any = _key(place, name, path, expression)
        path = (*path, key)
        inner = place[key] if isinstance(place, list) else place.get(key)
        if inner is None:
            inner = {}
        elif isinstance(inner, str) and path in _BARE_TEXT:
            inner = {"data": inner}
        elif not isinstance(inner, dict | list):
            what = f"`--set {expression}` goes through `{dotted(path)}`, which is not a mapping"
            raise UsageError(what, why=f"it is `{typed(inner)}`", hint=f"set `{dotted(path)}` itself")
        place[key] = inner
        place = inner
    last: Any = _key(place, keys[-1], path, expression)
    place[last] = value
    return (*path, last)


def _key(place: dict[str, Any] | list[Any], name: str, path: KeyPath, expression: str) -> str | int:
    """The name itself in a mapping, its number in a list."""
    if isinstance(place, dict):
        return name
    if name.isdecimal() and int(name) < len(place):
        return int(name)
    have = f"has {len(place)}, numbered from 0" if place else "is empty"
    raise UsageError(f"`--set {expression}`: there is no `{dotted((*path, name))}`", why=f"`{dotted(path)}` {have}")
