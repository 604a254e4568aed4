"""The part of a recipe that says what its result reads while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, StrictInt, StrictStr, model_serializer, model_validator

from prunekit.core.recipe_base import Part, gathered

# Keys that stand beside the options of any pattern.
SHARED = ("layers", "length_tokens")


class Attention(Part):
    """The keys that a query reads: a pattern by name, with its options beside the name."""

    pattern: StrictStr = Field(description="Name of the pattern.")
    layers: tuple[StrictInt, ...] | None = Field(
        default=None,
        description="Blocks that it is for, numbered from 0 as before the cut; null is all, the others stay dense.",
    )
    length_tokens: StrictInt | None = Field(
        default=None, ge=1, description="Longest sequence that it was chosen for; longer ones are refused."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the pattern.")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        return gathered(data, ("pattern", *SHARED), "options")

    @model_serializer
    def _flatten(self) -> dict[str, Any]:
        layers = {} if self.layers is None else {"layers": list(self.layers)}
        length = {} if self.length_tokens is None else {"length_tokens": self.length_tokens}
        return {"pattern": self.pattern, **self.options, **layers, **length}


class Runtime(Part):
    """What the result reads while it runs; a mapping with `pattern` is the attention alone."""

    attention: Attention = Field(description="The keys that a query reads.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"attention": data} if isinstance(data, Mapping) and "pattern" in data else data
