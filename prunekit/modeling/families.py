"""Which families have heterogeneous classes, and what their configuration says about them; knows no torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from prunekit.core.errors import PlanError

# Parts of file and class names, as `modeling_prunekit.py` has them.
MODULE = "modeling_prunekit"
PREFIX = "Prunekit"


@cache
def _table(name: str = "CLASSES") -> dict[str, str]:
    """A table of `modeling_prunekit.py`, which has to stand alone and imports torch, and so is read and not run."""
    file = Path(__file__).with_name(f"{MODULE}.py")
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            table: dict[str, str] = ast.literal_eval(statement.value)
            return table
    raise LookupError(f"`{file.name}` has no table `{name}`")


def hetero_families() -> tuple[str, ...]:
    """Stock model types that have heterogeneous classes."""
    return tuple(_table())


def hetero_model_type(model_type: str) -> str:
    """Model type of a family's heterogeneous models."""
    return f"prunekit_{model_type}"


def hetero_config_class(model_type: str) -> str:
    """Name of a family's heterogeneous configuration class."""
    return _names(model_type)[0]


def hetero_classes(model_type: str) -> dict[str, str]:
    """Heterogeneous model classes of a family, base model first, and the Auto class of each."""
    return {name: auto_class((name,)) for name in _names(model_type)[1:]}


def auto_class(architectures: Sequence[str]) -> str:
    """Auto class of transformers for an architecture name; `LlamaForCausalLM` gives `AutoModelForCausalLM`."""
    name = architectures[0] if architectures else ""
    if name.removeprefix(PREFIX) in _table("AUTO_CLASSES"):
        return _table("AUTO_CLASSES")[name.removeprefix(PREFIX)]
    head = re.search(r"For[A-Z]\w*$", name)
    if head:
        return f"AutoModel{head.group().replace('ForConditionalGeneration', 'ForImageTextToText')}"
    return "AutoModelForCausalLM" if name.endswith("LMHeadModel") else "AutoModel"


def _names(model_type: str) -> list[str]:
    prefix, *rest = _table()[model_type].split()
    return [f"{PREFIX}{prefix}{part}" for part in rest]


def hetero_config_fields(model_type: str, architectures: Sequence[str] | None) -> dict[str, Any]:
    """What a configuration says so that heterogeneous classes are found.

    Args:
        model_type: of the stock family, such as `llama`.
        architectures: stock classes that the source's configuration names; its base model where it names none.

    Returns:
        `model_type`, `architectures` and `auto_map`, the Auto class of the architecture last.
    Raises:
        PlanError: for a family or an architecture that has no heterogeneous class.
    """
    if model_type not in hetero_families():
        known = ", ".join(hetero_families())
        raise PlanError(f"`{model_type}` has no class for blocks that differ", hint=f"families that have: {known}")
    classes = hetero_classes(model_type)
    base = next(iter(classes))
    wanted = f"{PREFIX}{architectures[0]}" if architectures else base
    if wanted not in classes:
        known = ", ".join(name.removeprefix(PREFIX) for name in classes)
        raise PlanError(
            f"`{wanted.removeprefix(PREFIX)}` has no class for blocks that differ",
            hint=f"architectures of `{model_type}` that have: {known}",
        )
    named = {"AutoConfig": hetero_config_class(model_type), "AutoModel": base}
    if wanted != base:
        named[classes[wanted]] = wanted
    return {
        "model_type": hetero_model_type(model_type),
        "architectures": [wanted],
        "auto_map": {auto: f"{MODULE}.{name}" for auto, name in named.items()},
    }
