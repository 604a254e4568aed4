"""Weights as scores read them: from the files, without what earlier steps of a recipe cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.scores._weights import CheckpointWeights, Weights
from prunekit.surgery.slices import cuts_of, hidden_of, take

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.plan.plan import Plan
    from prunekit.structure.view import ModelView


def reading(view: ModelView, plan: Plan) -> Weights:
    """Weights of a model with a plan's widths cut, read when asked for; nothing is written.

    Args:
        view: the model before the cut.
        plan: cuts that are not carried out yet.
    """
    plain = CheckpointWeights(view.checkpoint)
    cuts, hidden = cuts_of(plan), hidden_of(plan)
    if not cuts and not hidden:
        return plain
    owners = {
        ref.name: (ref, view.sizes(sublayer), {**cuts.get(sublayer.address, {}), **hidden})
        for sublayer in view.sublayers
        if sublayer.address in cuts or hidden
        for ref in sublayer.tensors
    } | {ref.name: (ref, {}, hidden) for ref in view.outer if hidden}

    def read(name: str) -> Tensor:
        tensor = plain(name)
        if name not in owners:
            return tensor
        ref, sizes, keep = owners[name]
        return take(tensor, ref.layout, sizes, keep)

    return read
