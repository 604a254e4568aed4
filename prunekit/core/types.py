"""What methods hand over: scores, or the order in which a search removes units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

# What a step can remove.
Kind = Literal[
    "blocks",
    "sublayers",
    "attention",
    "cross_attention",
    "ffn",
    "query_heads",
    "kv_groups",
    "neurons",
    "experts",
    "hidden",
]
KINDS: tuple[str, ...] = get_args(Kind)
# Those that narrow a sub-layer, or the whole model.
WIDTH_KINDS = ("query_heads", "kv_groups", "neurons", "experts", "hidden")


@dataclass(frozen=True)
class Scores:
    """One number a unit.

    Args:
        method: registry name of the score.
        kind: kind of unit, such as `blocks`.
        units: addresses.
        values: scores in the same order, higher = keep.
        provenance: what the scores were made from: knobs, data, precision.
    """

    method: str
    kind: str
    units: tuple[str, ...]
    values: tuple[float, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "method": self.method,
            "kind": self.kind,
            "units": list(self.units),
            "values": list(self.values),
            "provenance": dict(self.provenance),
        }


@dataclass(frozen=True)
class OrderStep:
    """One removal of a search.

    Args:
        units: sub-layers that go together, such as `("blocks.3.attention", "blocks.3.ffn")`.
        distance: between the outputs of the dense model and of the model without all units removed so far.
    """

    units: tuple[str, ...]
    distance: float


@dataclass(frozen=True)
class Order:
    """A whole removal order, so that one search serves every fraction.

    Args:
        method: registry name of the search.
        steps: first removal first.
        provenance: knobs, data, number of evaluations.
    """

    method: str
    steps: tuple[OrderStep, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        steps = [{"units": list(step.units), "distance": step.distance} for step in self.steps]
        return {"method": self.method, "steps": steps, "provenance": dict(self.provenance)}


@dataclass(frozen=True)
class Panel:
    """One measurement over the depth of a model, as a table.

    Args:
        name: key, such as `sink`.
        title: what is measured, in words.
        unit: of the values, "" where they have none.
        form: `heads`: a column a query head; `curve`: a column a series.
        rows: addresses, in execution order.
        columns: heads as numbers, or names of the series.
        values: one row an address; None where there is no such value.
        threshold: at or above it a head counts as having the role that the panel is about; None where there is none.
    """

    name: str
    title: str
    unit: str
    form: Literal["heads", "curve"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    threshold: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "form": self.form,
            "rows": list(self.rows),
            "columns": list(self.columns),
            "values": [list(row) for row in self.values],
            "threshold": self.threshold,
        }
