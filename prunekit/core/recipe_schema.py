"""JSON Schema of recipes with the knobs of every method, so that editors complete and check while typing."""

from __future__ import annotations

import inspect
from typing import Any

from prunekit.core.method_card import SECTIONS, arguments, card, method_names, registries, task_card
from prunekit.core.recipe_model import REGISTRIES, Recipe
from prunekit.core.recipe_runtime import SHARED
from prunekit.core.registry import ATTENTIONS, PATTERNS, TASKS


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe; `by` is one of the methods there are, each with its own knobs."""
    from pydantic import TypeAdapter

    schema = Recipe.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    definitions["Method"] = {
        "description": definitions["Method"]["description"],
        "oneOf": [{"$ref": f"#/$defs/{role}_{name}"} for role, name in _usable() if role in REGISTRIES],
    }
    shared = {}
    for after, title in (("repair", "Repair"), ("learn", "Learn"), ("heal", "Heal")):
        plain = definitions[title]
        shared[after] = {key: value for key, value in plain["properties"].items() if key not in ("method", "knobs")}
        definitions[title] = {
            "description": plain["description"],
            "oneOf": [{"$ref": f"#/$defs/{role}_{name}"} for role, name in _usable() if SECTIONS.get(role) == after],
        }
    text = {"$ref": "#/$defs/HealText"}
    for section in ("learn", "heal"):
        data = {**shared[section]["data"], "anyOf": [text, {"type": "array", "items": text}]}
        shared[section]["data"] = {k: v for k, v in data.items() if k not in ("type", "items", "minItems")}
    for role, name in _usable():
        knobs = TypeAdapter(registries()[role].get(name)).json_schema(ref_template=f"#/$defs/{role}_{name}_{{model}}")
        for inner, definition in knobs.pop("$defs", {}).items():
            definitions[f"{role}_{name}_{inner}"] = definition
        definitions[f"{role}_{name}"] = _method(
            role, name, knobs, {} if role == "attention" else shared.get(SECTIONS.get(role, ""))
        )
    definitions["HealAttention"] = {
        "description": definitions["HealAttention"]["description"],
        "anyOf": [
            {"enum": list(ATTENTIONS.names())},
            *({"$ref": f"#/$defs/attention_{name}"} for name in ATTENTIONS.names()),
        ],
    }
    definitions["Measurement"] = {
        "description": definitions["Measurement"]["description"],
        "anyOf": [{"enum": list(TASKS.names())}, *({"$ref": f"#/$defs/task_{name}"} for name in TASKS.names())],
    }
    for name in TASKS.names():
        definitions[f"task_{name}"] = _task(name)
    definitions |= {f"pattern_{name}": _pattern(name, definitions["Attention"]) for name in PATTERNS.names()}
    about = definitions["Attention"]["description"]
    pattern = [{"$ref": f"#/$defs/pattern_{name}"} for name in PATTERNS.names()]
    definitions["Attention"] = {"description": about, "oneOf": pattern}
    runtime = definitions["Runtime"]
    definitions["Runtime"] = {
        "description": runtime["description"],
        "anyOf": [runtime, {"$ref": "#/$defs/Attention"}],
    }
    for short in ("Perplexity", "KL", "Embedding", "HealText"):
        mapping = definitions[short]
        definitions[short] = {"anyOf": [mapping, {"type": "string"}], "description": mapping["description"]}
    schema["anyOf"] = [{"required": [name]} for name in ("steps", "learn", "vocab")]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "prunekit recipe"}


def _usable() -> list[tuple[str, str]]:
    """(role, name) of the methods that a recipe may name."""
    return [(role, name) for role, name in method_names() if role in (*REGISTRIES, *SECTIONS, "attention")]


def _task(name: str) -> dict[str, Any]:
    from pydantic import TypeAdapter

    about, options = task_card(name), TypeAdapter(TASKS.get(name)).json_schema()
    meanings = {knob.name: knob.meaning for knob in about.knobs}
    properties = {
        key: {"description": meanings.get(key, ""), **value} for key, value in options.get("properties", {}).items()
    }
    return {
        "type": "object",
        "title": name,
        "description": about.summary,
        "properties": {"task": {"const": name}, "name": {"type": "string"}, **properties},
        "required": ["task", *options.get("required", [])],
        "additionalProperties": False,
    }


def _pattern(name: str, plain: dict[str, Any]) -> dict[str, Any]:
    """Schema of one pattern's mapping; `plain`: that of the keys which all patterns have."""
    from pydantic import TypeAdapter

    cls = PATTERNS.get(name)
    text = inspect.cleandoc(cls.__doc__ or "")
    meanings, options = arguments(text), TypeAdapter(cls).json_schema().get("properties", {})
    shared = {key: plain["properties"][key] for key in SHARED}
    known = {key: {"description": meanings.get(key, ""), **value} for key, value in options.items()}
    return {
        "type": "object",
        "title": name,
        "description": text.partition("\n")[0],
        "properties": {"pattern": {"const": name}, **known, **shared},
        "required": ["pattern"],
        "additionalProperties": False,
    }


def _method(role: str, name: str, knobs: dict[str, Any], shared: dict[str, Any] | None) -> dict[str, Any]:
    """Schema of one method's mapping; `shared`: the keys that all methods of its section have."""
    entry = card(role, name)
    key, others = (role, {}) if shared is None else ("method", shared)
    asked = [field for field in ("remove", "budget") if role == "gate"]
    meanings = {knob.name: knob.meaning for knob in entry.knobs}
    properties = {
        knob: {"description": meanings.get(knob, ""), **value} for knob, value in knobs.get("properties", {}).items()
    }
    return {
        "type": "object",
        "title": name,
        "description": f"{entry.summary} Kinds: {', '.join(entry.kinds)}." if entry.kinds else entry.summary,
        "properties": {key: {"const": name}, **others, **properties},
        "required": [key, *asked, *knobs.get("required", [])],
        "additionalProperties": False,
    }
