"""Weights as scores read them: from the files, without what earlier steps of a recipe cut."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from prunekit.core.errors import StructureError
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
    Returns:
        What fails when it is asked for a weight of a quantised model.
    """
    if view.quantised:
        return partial(_refuse, view)
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


def _refuse(view: ModelView, name: str) -> Tensor:
    why = f"`{name}` is packed ({view.quantised})"
    hint = "make the plan with the model that is not quantised: `prunekit apply` carries it out on this one"
    raise StructureError("weights of a quantised checkpoint cannot be scored", why=why, hint=hint)
