"""The model that a plan leaves, seen before it is cut: what later steps of a recipe choose from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from prunekit.plan.cost import kept_experts, kept_hidden, kept_widths
from prunekit.structure.architecture import dim_size
from prunekit.structure.parts import HIDDEN, SubLayer
from prunekit.structure.view import ModelView

if TYPE_CHECKING:
    from prunekit.plan.plan import Plan


def after(view: ModelView, plan: Plan) -> ModelView:
    """The structure that a plan leaves; blocks keep their numbers, shapes are those after the cut.

    Its `checkpoint` is still the one before the cut, so weights read through it have their old shapes.
    """
    blocks = tuple(
        replace(
            block,
            attention=_left(view, block.attention, plan),
            cross_attention=_left(view, block.cross_attention, plan),
            ffn=_left(view, block.ffn, plan),
        )
        for block in view.blocks
    )
    narrow = kept_hidden(view, plan)
    outer = tuple(
        replace(ref, shape=tuple(narrow if d == (HIDDEN,) else n for d, n in zip(ref.layout, ref.shape, strict=True)))
        for ref in view.outer
    )
    return replace(view, blocks=blocks, outer=outer, hidden=narrow)


def _left(view: ModelView, sublayer: SubLayer | None, plan: Plan) -> SubLayer | None:
    if sublayer is None or sublayer.address in plan.drop:
        return None
    widths = kept_widths(sublayer, plan)
    sizes = {**view.sizes(sublayer), **widths, HIDDEN: kept_hidden(view, plan)}
    experts = kept_experts(sublayer, plan)
    tensors = tuple(
        replace(
            ref,
            shape=tuple(dim_size(dim, sizes) for dim in ref.layout),
            expert=None if ref.expert is None else experts[ref.expert],
        )
        for ref in sublayer.tensors
        if ref.expert is None or ref.expert in experts
    )
    return replace(sublayer, widths=widths, tensors=tensors)
