"""What the models of a recipe have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A mapping of a recipe: no unknown key, no change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def named_text(data: Any) -> Any:
    """A bare text as the name of the data."""
    return {"data": data} if isinstance(data, str) else data


def gathered(data: Any, own: Collection[str], rest: str = "knobs") -> Any:
    """A mapping whose other keys belong to a method: its own keys as they are, the others under `rest`."""
    if not isinstance(data, Mapping):
        return data
    named = {key: value for key, value in data.items() if key in own}
    return {**named, rest: {key: value for key, value in data.items() if key not in own}}
