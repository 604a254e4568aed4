"""The runtime section of a model's config: which pattern, on which layers.

In `config.json`: `"prunekit": {"runtime": {"attention": {"pattern": "power", "block_tokens": 128, "layers": [1, 2]}}}`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunekit.core.errors import RuntimePolicyError, UsageError
from prunekit.runtime.attention import patterns
from prunekit.runtime.attention.patterns._engine import Pattern
from prunekit.runtime.attention.patterns._scored import Scored


@dataclass(frozen=True)
class Policy:
    """A pattern and the layers it is for; `layers` None means all of them."""

    pattern: Pattern | Scored
    layers: tuple[int, ...] | None = None

    def covers(self, layer: int | None) -> bool:
        """Whether the pattern is for this layer."""
        return self.layers is None or layer in self.layers

    def section(self) -> dict[str, Any]:
        """The policy as it stands in a config."""
        layers = {} if self.layers is None else {"layers": list(self.layers)}
        return {"pattern": name_of(self.pattern), **dataclasses.asdict(self.pattern), **layers}  # type: ignore[call-overload]


def names() -> tuple[str, ...]:
    """All patterns by name."""
    found = (module.name for module in pkgutil.iter_modules(patterns.__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def name_of(pattern: Pattern | Scored) -> str:
    """The name under which a pattern is found."""
    return type(pattern).__module__.rpartition(".")[2]


def pattern_class(name: str) -> type:
    """The pattern of that name.

    Raises:
        UsageError: if there is none.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(names())}"
        raise UsageError(f"no pattern named `{name}`", hint=hint)
    module = importlib.import_module(f"{patterns.__name__}.{name}")
    found: type = getattr(module, "".join(part.capitalize() for part in name.split("_")))
    return found


def policy(section: Mapping[str, Any] | str | Pattern | Scored, layers: tuple[int, ...] | None = None) -> Policy:
    """Policy from a config section, a pattern's name, or a pattern.

    Raises:
        UsageError: for an unknown pattern, option, or value.
    """
    if isinstance(section, str):
        section = {"pattern": section}
    if not isinstance(section, Mapping):
        return Policy(section, layers)
    options = dict(section)
    name = options.pop("pattern", None)
    if not isinstance(name, str):
        raise UsageError("a runtime section names no pattern", hint=f"add `pattern:`, one of {', '.join(names())}")
    listed = options.pop("layers", None)
    known = pattern_class(name)
    allowed = [field.name for field in dataclasses.fields(known)]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise UsageError(f"`{unknown[0]}` is no option of pattern `{name}`", hint=f"there are {', '.join(allowed)}")
    if listed is not None and not (isinstance(listed, list | tuple) and all(type(n) is int for n in listed)):
        raise UsageError(f"`layers: {listed}` is no list of layers", hint="for example layers=[2, 3]")
    return Policy(known(**options), layers if listed is None else tuple(listed))


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> Policy:
    return policy(json.loads(text))


def policy_of(config: Any) -> Policy:
    """The policy of a model's config.

    Raises:
        RuntimePolicyError: if the config has none.
    """
    section = getattr(config, "prunekit", None)
    section = section.get("runtime", {}).get("attention") if isinstance(section, Mapping) else None
    if section is None:
        raise RuntimePolicyError(
            '`attn_implementation="prunekit"` finds no pattern in the config of this model',
            hint="set `config.prunekit` to a runtime section, or use prunekit.runtime.attach(model, pattern=...)",
        )
    return _parsed(json.dumps(section, sort_keys=True))
