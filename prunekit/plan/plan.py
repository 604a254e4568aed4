"""The exact cuts, as a file that a person can read and another copy of the model can replay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import PlanError
from prunekit.structure.parts import HIDDEN, WIDTHS
from prunekit.structure.view import PACKED_HINT

if TYPE_CHECKING:
    from prunekit.structure.view import ModelView

VERSION = 1
# Key in `keep` of the vocabulary rows that stay.
VOCAB = "vocab"


@dataclass(frozen=True)
class Plan:
    """What goes.

    Args:
        drop: addresses of the sub-layers that go whole, in execution order.
        keep: positions that stay, ascending, by `blocks.3.ffn.neurons`, `blocks.3.attention.kv_groups` or
            `blocks.3.attention.query_heads` (positions inside a KV group, the same in every group); `neurons` of an
            FFN with experts are positions inside an expert, the same in every expert; `hidden`: channels of the
            residual stream; `vocab`: ids of the tokens that stay.
        model: what the plan was made for: model type, and the widths of every block.
    """

    drop: tuple[str, ...]
    keep: Mapping[str, tuple[int, ...]]
    model: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, view: ModelView, drop: Iterable[str] = (), keep: Mapping[str, Iterable[int]] | None = None) -> Plan:
        """A plan for a model, checked against it; what keeps everything is left out.

        Raises:
            PlanError: as `check`.
        """
        wanted = set(drop)
        ordered = [s.address for s in view.sublayers if s.address in wanted]
        unknown = sorted(wanted - set(ordered))
        kept = {address: tuple(positions) for address, positions in (keep or {}).items()}
        plan = cls((*ordered, *unknown), kept, signature(view))
        plan.check(view)
        return cls(plan.drop, {a: k for a, k in kept.items() if len(k) < _width(view, a)}, plan.model)

    def check(self, view: ModelView) -> None:
        """Makes sure that the plan fits a model.

        Raises:
            PlanError: if it was made for another shape of model, names what is not there, or leaves nothing.
        """
        if self.model and dict(self.model) != signature(view):
            theirs, ours = self.model, signature(view)
            differs = next((key for key in ours if theirs.get(key) != ours[key]), "model_type")
            raise PlanError(
                "the plan was made for another model",
                why=f"`{differs}` differs",
                hint="make a plan of this model: prunekit plan --recipe FILE --output plan.json",
            )
        there = {sublayer.address for sublayer in view.sublayers}
        for address in self.drop:
            if address not in there:
                raise PlanError(f"the plan drops `{address}`, which the model does not have")
        if not there - set(self.drop):
            raise PlanError("the plan leaves no sub-layer", why=f"all {len(there)} would go", hint="remove less")
        for address, kept in self.keep.items():
            self._check_width(view, address, kept)

    def _check_width(self, view: ModelView, address: str, kept: tuple[int, ...]) -> None:
        owner, _, kind = address.rpartition(".")
        if owner in self.drop:
            raise PlanError(f"the plan narrows `{address}` and drops `{owner}`", hint="it can only do one of them")
        width = _width(view, address)
        if address == HIDDEN:
            view.hidden_rule()
        packed = view.packed_along(address) if len(kept) < width else ""
        if packed:
            raise PlanError(f"`{address}` cannot be narrowed", why=packed, hint=PACKED_HINT)
        if kind in view.arch.fixed and len(kept) < width:
            raise PlanError(f"`{address}` cannot be narrowed", why=view.arch.fixed[kind])
        if kind == "experts" and 0 < len(kept) < min(view.active_experts, width):
            raise PlanError(
                f"the plan leaves {len(kept)} experts in `{owner}`",
                why=f"every token passes {view.active_experts}",
                hint=f"keep at least {view.active_experts}, for example with `min_keep`",
            )
        if not kept:
            raise PlanError(
                f"the plan leaves no {kind} in `{owner or 'the model'}`",
                why=f"all {width} would go",
                hint="remove less",
            )
        if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= width:
            raise PlanError(
                f"the positions kept in `{address}` are wrong", why=f"they must ascend within 0-{width - 1}"
            )

    def then(self, view: ModelView, later: Plan) -> Plan:
        """This plan and one made for what it leaves of the model, as one plan of the model.

        Args:
            view: the model that this plan was made for.
            later: positions in its `keep` count what this plan keeps; addresses are those of `view`.
        """
        drop = {*self.drop, *later.drop}
        keep = dict(self.keep)
        for address, positions in later.keep.items():
            before = keep.get(address)
            keep[address] = positions if before is None else tuple(before[i] for i in positions)
        return Plan.make(view, drop, {a: k for a, k in keep.items() if a.rpartition(".")[0] not in drop})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        keep = {address: list(kept) for address, kept in self.keep.items()}
        return {"plan": VERSION, "model": dict(self.model), "drop": list(self.drop), "keep": keep}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: if the values are of another form.
        """
        if data.get("plan") != VERSION:
            raise ValueError(f"`plan` must be {VERSION}")
        drop, keep, model = data["drop"], data["keep"], data["model"]
        numbers = [number for kept in keep.values() for number in kept]
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            raise ValueError("`keep` must hold lists of whole numbers")
        if not isinstance(drop, list) or not all(isinstance(address, str) for address in drop):
            raise ValueError("`drop` must be a list of addresses")
        return cls(tuple(drop), {address: tuple(kept) for address, kept in keep.items()}, dict(model))


def signature(view: ModelView) -> dict[str, Any]:
    """What must be the same in every model that a plan fits: model type and the widths of each sub-layer."""
    widths = [[sublayer.address, *sublayer.widths.values()] for sublayer in view.sublayers]
    return {"model_type": view.model_type, "hidden": view.hidden, "sublayers": widths}


def _width(view: ModelView, address: str) -> int:
    """Units there are at a width address."""
    if address == VOCAB and view.vocabulary:
        return view.vocabulary
    owner, _, kind = address.rpartition(".")
    if address == HIDDEN:
        return view.hidden
    found = next((sublayer for sublayer in view.sublayers if sublayer.address == owner), None)
    if found is None or kind not in WIDTHS or WIDTHS[kind][1] not in found.widths:
        raise PlanError(f"the plan narrows `{address}`, which the model does not have")
    return found.widths[WIDTHS[kind][1]]
