"""What a model costs, before and after a plan, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prunekit.checkpoint.reader import ITEM_BYTES
from prunekit.core.errors import PlanError
from prunekit.plan.plan import VOCAB
from prunekit.structure.architecture import dim_size
from prunekit.structure.parts import HIDDEN, WIDTHS

if TYPE_CHECKING:
    from prunekit.plan.plan import Plan
    from prunekit.structure.parts import SubLayer, TensorRef
    from prunekit.structure.view import ModelView

CostKind = Literal["params", "flops", "kv_bytes"]


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Args:
        params: stored weights; a tied head counts once, and a quantised matrix as the matrix that it is.
        block_params: those inside blocks.
        flops_per_token: two for each weight of a matrix that a token passes: blocks, with those experts only that one
            token goes to, head, patch projection. What attention spends on its context is left out, since it depends
            on its length.
        kv_bytes_per_token: keys and values that a decoder keeps for each token, in the type of weights not quantised;
            those that its cross-attention keeps for each position of the encoder are left out.
        weight_bytes: bytes of all weights.
    """

    params: int
    block_params: int
    flops_per_token: int
    kv_bytes_per_token: int
    weight_bytes: int


def cost(view: ModelView, plan: Plan | None = None) -> Cost:
    """Cost of a model, or of what a plan leaves of it."""
    left = [
        (sublayer, {**kept_widths(sublayer, plan), HIDDEN: kept_hidden(view, plan)})
        for sublayer in view.sublayers
        if plan is None or sublayer.address not in plan.drop
    ]
    parts = [part for sublayer, widths in left for part in _counts(view, sublayer, widths)]
    outer = [(ref, _outer_count(view, ref, plan)) for ref in view.outer]
    outer_matrices = [ref for ref in (view.head, view.projection) if ref is not None]
    return Cost(
        params=sum(_weights(ref, count) for ref, count in (*parts, *outer)),
        block_params=sum(_weights(ref, count) for ref, count in parts),
        flops_per_token=_flops(view, parts)
        + sum(2 * _weights(ref, _outer_count(view, ref, plan)) for ref in outer_matrices),
        kv_bytes_per_token=sum(_kv_bytes(view, sublayer, widths) for sublayer, widths in left),
        weight_bytes=sum(count * ITEM_BYTES[ref.dtype] for ref, count in (*parts, *outer)),
    )


def unit_cost(view: ModelView, address: str, of: str) -> float:
    """What a unit costs: params, flops or kv_bytes a token.

    Args:
        view: the model.
        address: of a block, a sub-layer, or one unit of a width such as `blocks.3.ffn.neurons.7`.
        of: `params`, `flops`, `kv_bytes`, or `units`, of which each is one.
    Raises:
        PlanError: for a cost that shapes do not tell.
    """
    if of == "units":
        return 1.0
    owner, kind = _owner(address)
    if owner == HIDDEN:
        less = {HIDDEN: view.hidden - 1}
        return sum(sublayer_cost(view, s, of) - sublayer_cost(view, s, of, less) for s in view.sublayers)
    if kind:
        sublayer = view.sublayer(owner)
        axis = WIDTHS[kind][1]
        return sublayer_cost(view, sublayer, of) - sublayer_cost(view, sublayer, of, {axis: sublayer.widths[axis] - 1})
    parts = [s for s in view.sublayers if s.address == address or s.address.rpartition(".")[0] == address]
    if not parts:
        raise PlanError(f"the model has no `{address}`")
    return float(sum(sublayer_cost(view, sublayer, of) for sublayer in parts))


def _owner(address: str) -> tuple[str, str]:
    """Sub-layer and width kind of a width unit's address; the address itself and "" for a whole unit."""
    parts = address.split(".")
    if parts[0] == HIDDEN:
        return HIDDEN, HIDDEN
    return (".".join(parts[:-2]), parts[-2]) if len(parts) >= 3 and parts[-2] in WIDTHS else (address, "")


def sublayer_cost(view: ModelView, sublayer: SubLayer, of: str, changed: Mapping[str, int] | None = None) -> float:
    """What a sub-layer costs when some of its axes have other sizes; `of` as for `unit_cost`."""
    widths = {**sublayer.widths, **(changed or {})}
    if of == "params":
        return sum(_weights(ref, count) for ref, count in _counts(view, sublayer, widths))
    if of == "flops":
        return _flops(view, _counts(view, sublayer, widths))
    if of == "kv_bytes":
        return _kv_bytes(view, sublayer, widths)
    raise PlanError(f"shapes do not tell `{of}`", hint="use params, flops or kv_bytes")


def kept_hidden(view: ModelView, plan: Plan | None) -> int:
    """Width of the residual stream after a plan."""
    kept = plan.keep.get(HIDDEN) if plan is not None else None
    return view.hidden if kept is None else len(kept)


def _outer_count(view: ModelView, ref: TensorRef, plan: Plan | None) -> int:
    """Weights of a tensor outside blocks after a plan."""
    narrow = kept_hidden(view, plan)
    sizes = [narrow if dim == (HIDDEN,) else size for dim, size in zip(ref.layout, ref.shape, strict=True)]
    if plan is not None and VOCAB in plan.keep and view.is_rows(ref):
        sizes[0] = len(plan.keep[VOCAB])
    return math.prod(sizes)


def kept_widths(sublayer: SubLayer, plan: Plan | None) -> dict[str, int]:
    """Widths of a sub-layer after a plan, by axis."""
    widths = dict(sublayer.widths)
    for kind, (_, axis) in WIDTHS.items():
        kept = plan.keep.get(f"{sublayer.address}.{kind}") if plan is not None else None
        if kept is not None:
            widths[axis] = len(kept)
    return widths


def kept_experts(sublayer: SubLayer, plan: Plan) -> dict[int, int]:
    """New number of each expert that stays, by its old one; empty where there are none."""
    every = range(sublayer.widths.get("experts", 0))
    kept = plan.keep.get(f"{sublayer.address}.experts", every)
    return {old: new for new, old in enumerate(kept)}


def _counts(view: ModelView, sublayer: SubLayer, widths: Mapping[str, int]) -> list[tuple[TensorRef, int]]:
    """Every tensor of a sub-layer with how many values it holds at these widths."""
    sizes = {**view.sizes(sublayer), **widths}
    # Experts are alike, so that it does not matter which of them stay.
    return [
        (ref, math.prod(dim_size(dim, sizes) for dim in ref.layout))
        for ref in sublayer.tensors
        if ref.expert is None or ref.expert < sizes["experts"]
    ]


def _weights(ref: TensorRef, count: int) -> int:
    """Weights that so many values of a tensor are."""
    return count if ref.packed is None else ref.packed.weights


def _flops(view: ModelView, parts: Iterable[tuple[TensorRef, int]]) -> int:
    """A token passes as many experts as the configuration says, and experts are alike."""
    passed = [(ref, count) for ref, count in parts if ref.expert is None or ref.expert < view.active_experts]
    return sum(2 * _weights(ref, count) for ref, count in passed if ref.packed is not None or len(ref.shape) == 2)


def _kv_bytes(view: ModelView, sublayer: SubLayer, widths: Mapping[str, int]) -> int:
    if sublayer.kind != "attention" or not view.stack_of(sublayer.block).decoder:
        return 0
    matrices = [ref for ref in sublayer.tensors if len(ref.shape) == 2 and ref.packed is None]
    plain = matrices or [ref for ref in sublayer.tensors if ref.packed is None]
    item = max(ITEM_BYTES[ref.dtype] for ref in plain)
    return 2 * widths["kv"] * widths["hd"] * item
