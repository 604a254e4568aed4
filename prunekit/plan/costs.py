"""Measured milliseconds of sub-layers by kind and width, and what they predict of a whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prunekit.core.errors import PlanError, UsageError
from prunekit.plan.cost import kept_widths

if TYPE_CHECKING:
    from prunekit.plan.plan import Plan
    from prunekit.structure.parts import SubLayer
    from prunekit.structure.view import ModelView

VERSION = 1
Runtime = Literal["torch", "onnxruntime"]
# The axis of each kind of sub-layer whose widths are measured.
AXES = {"attention": "kv", "ffn": "ffn"}


@dataclass(frozen=True)
class CostTable:
    """What one pass of a model takes, split into its sub-layers and the rest.

    Args:
        on: what ran it.
        batch: sequences in the pass.
        tokens: tokens in each sequence.
        model: of which models it speaks: `model_type`, `hidden`, `outer_params` (weights outside blocks), and the
            widths of an uncut `attention` and `ffn`.
        overhead_ms: embeddings, last norm, head, and what the runtime takes of its own.
        attention: milliseconds of an attention by its number of KV groups.
        ffn: milliseconds of an FFN by its number of neurons.
        environment: machine, device, type, versions.
        measured: how it was measured: blocks in the models run, passes.
    """

    on: Runtime
    batch: int
    tokens: int
    model: Mapping[str, Any]
    overhead_ms: float
    attention: Mapping[int, float]
    ffn: Mapping[int, float]
    environment: Mapping[str, Any]
    measured: Mapping[str, Any]

    def sublayer_ms(self, sublayer: SubLayer, widths: Mapping[str, int] | None = None) -> float:
        """Milliseconds of a sub-layer; widths between two that were measured lie on the line between them.

        Args:
            sublayer: of the model that the table speaks of.
            widths: what it is cut to, by axis; None for as it is.
        Raises:
            PlanError: for a sub-layer of other heads or experts than those measured.
        """
        found, kind = dict(widths or sublayer.widths), sublayer.kind
        usual = self.model[kind]
        odd = next((axis for axis in found if axis != AXES[kind] and found[axis] != usual.get(axis)), None)
        if odd is not None:
            why = f"its axis `{odd}` is {found[odd]}, the table's {usual.get(odd)}"
            raise PlanError(f"the cost table does not know `{sublayer.address}`", why=why)
        return _between(getattr(self, kind), found[AXES[kind]])

    def predict(self, view: ModelView, plan: Plan | None = None) -> float:
        """Milliseconds of one pass of a model, or of what a plan leaves of it."""
        left = [s for s in view.sublayers if plan is None or s.address not in plan.drop]
        return self.overhead_ms + sum(self.sublayer_ms(s, kept_widths(s, plan)) for s in left)

    def unit_ms(self, view: ModelView, address: str) -> float:
        """Milliseconds that removing a block or a sub-layer of a model saves."""
        parts = [s for s in view.sublayers if address in (s.address, s.address.rpartition(".")[0])]
        return sum(self.sublayer_ms(sublayer) for sublayer in parts)

    def require(self, view: ModelView, on: str, batch: int, tokens: int, at: str) -> None:
        """Makes sure that the table speaks of this model and this pass.

        Raises:
            UsageError: naming what differs.
        """
        asked = {"on": on, "batch": batch, "tokens": tokens, "model": model_of(view)}
        for key, value in asked.items():
            held = getattr(self, key) if key != "model" else dict(self.model)
            if held != value:
                why = f"the table's is {_short(held)}, asked for is {_short(value)}"
                hint = "measure one with `prunekit costs`, or leave `costs` out"
                raise UsageError(f"the cost table is of another `{key}`", why=why, hint=hint, at=at)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        data = asdict(self)
        for kind in AXES:
            data[kind] = {str(width): data[kind][width] for width in sorted(data[kind], reverse=True)}
        return {"costs": VERSION, **data}

    @classmethod
    def from_json(cls, data: Any) -> CostTable:
        """The table that `to_json` wrote.

        Raises:
            ValueError: if the values are of another form.
        """
        if not isinstance(data, dict) or data.get("costs") != VERSION:
            raise ValueError(f"`costs` must be {VERSION}")
        try:
            if data["on"] not in ("torch", "onnxruntime"):
                raise ValueError("`on` must be torch or onnxruntime")
            tables = {kind: {int(width): _ms(value) for width, value in data[kind].items()} for kind in AXES}
            if not all(tables.values()):
                raise ValueError("it has no milliseconds of an attention or an FFN")
            return cls(
                on=data["on"],
                batch=int(data["batch"]),
                tokens=int(data["tokens"]),
                model={**data["model"], **{kind: dict(data["model"][kind]) for kind in AXES}},
                overhead_ms=_ms(data["overhead_ms"]),
                attention=tables["attention"],
                ffn=tables["ffn"],
                environment=dict(data["environment"]),
                measured=dict(data["measured"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`{error}` is missing or of the wrong type") from error


def read_costs(file: Path) -> CostTable:
    """The cost table in a file.

    Raises:
        UsageError: if there is none.
    """
    hint = "write one with `prunekit costs MODEL --output costs.json`"
    try:
        return CostTable.from_json(json.loads(file.read_text("utf-8")))
    except OSError as error:
        raise UsageError(f"`{file}` cannot be read", why=error.strerror or str(error), hint=hint) from error
    except ValueError as error:
        raise UsageError(f"`{file}` is no cost table", why=str(error), hint=hint) from error


def model_of(view: ModelView) -> dict[str, Any]:
    """Of which models a table speaks that is measured on this one: its type and its widest attention and FFN."""
    outer = sum(math.prod(ref.shape) for ref in view.outer)
    found: dict[str, Any] = {"model_type": view.model_type, "hidden": view.hidden, "outer_params": outer}
    for kind, axis in AXES.items():
        alike = [sublayer.widths for sublayer in view.sublayers if sublayer.kind == kind]
        if not alike:
            raise PlanError(f"the model has no {kind} to measure")
        found[kind] = dict(max(alike, key=lambda widths: widths[axis]))
    return found


def _between(table: Mapping[int, float], width: int) -> float:
    """Value at a width on straight lines between measured ones; the outermost lines go on, never below 0."""
    if width in table:
        return table[width]
    known = sorted(table)
    if len(known) == 1:
        return table[known[0]] * width / known[0]
    place = min(max(next((i for i, w in enumerate(known) if w > width), len(known)), 1), len(known) - 1)
    low, high = known[place - 1], known[place]
    return max(0.0, table[low] + (table[high] - table[low]) * (width - low) / (high - low))


def _ms(value: Any) -> float:
    found = float(value)
    if not math.isfinite(found) or found < 0:
        raise ValueError(f"`{value}` is no time")
    return found


def _short(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else f"`{value}`"
