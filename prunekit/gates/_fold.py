"""From gates to a cut: the plan, and the factors folded into the matrices that lead away from the units."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunekit.checkpoint.reader import torch_dtypes
from prunekit.gates._places import channel_units
from prunekit.plan.plan import Plan
from prunekit.structure.parts import HIDDEN
from prunekit.surgery.hidden import scale, writes
from prunekit.surgery.slices import cuts_of, hidden_of, take

if TYPE_CHECKING:
    from prunekit.checkpoint.reader import Checkpoint
    from prunekit.gates._learn import Task
    from prunekit.gates._places import Place
    from prunekit.structure.parts import SubLayer, TensorRef
    from prunekit.structure.view import ModelView


def plan_of(task: Task, keep: Tensor) -> Plan:
    """The cuts that leave the units kept.

    Args:
        task: the units.
        keep: bool [units of all places].
    """
    drop, kept = [], {}
    for place in task.places:
        stays = keep[place.slice].nonzero().flatten().tolist()
        if place.axis:
            kept[HIDDEN if place.kind == HIDDEN else f"{place.address}.{place.kind}"] = stays
        elif not stays:
            drop.append(place.address)
    return Plan.make(task.view, drop, {a: k for a, k in kept.items() if a.rpartition(".")[0] not in drop})


def folded(
    model: Any, names: Mapping[str, str], task: Task, factors: Tensor, plan: Plan, checkpoint: Checkpoint, every: bool
) -> dict[str, Tensor]:
    """Tensors of the cut model that differ from those in the files.

    Args:
        model: with gates, trained; float32.
        names: parameter for each tensor of the files.
        task: the units.
        factors: of every unit, float32 [units of all places].
        plan: what goes.
        checkpoint: the files, for types.
        every: whether weights were trained, so that every tensor may differ.
    """
    view, parameters = task.view, dict(model.named_parameters(remove_duplicate=False))
    cuts, hidden = cuts_of(plan), hidden_of(plan)
    owned = [(ref, s) for s in view.sublayers if s.address not in plan.drop for ref in s.tensors]
    found = {}
    for ref, sublayer in [*((ref, None) for ref in view.outer), *owned]:
        spread = [part for place in task.places for part in _folds(view, place, factors[place.slice], ref, sublayer)]
        if ref.name not in names or not (every or spread):
            continue
        value = parameters[names[ref.name]].detach().cpu().float()
        for part in spread:
            value = value * part
        keep = {**(cuts.get(sublayer.address, {}) if sublayer else {}), **hidden}
        value = take(value, ref.layout, view.sizes(sublayer) if sublayer else {}, keep) * scale(
            view, plan, ref, sublayer
        )
        found[ref.name] = value.to(torch_dtypes()[checkpoint.tensors[ref.name].dtype]).contiguous()
    return found


def _folds(
    view: ModelView, place: Place, factor: Tensor, ref: TensorRef, sublayer: SubLayer | None
) -> Iterator[Tensor]:
    """What a place's factors multiply a tensor by, in a shape that broadcasts; nothing where they are none of its."""
    if place.kind == HIDDEN:
        yield from _hidden_folds(view, factor, ref, sublayer)
    elif sublayer is not None and sublayer.address == place.address:
        weight = view.output(sublayer)
        if place.axis and ref.name == weight.name:
            channels = factor[channel_units(weight, place.axis, view.sizes(sublayer))]
            yield channels if weight.layout[0] == (HIDDEN,) else channels[:, None]
        elif not place.axis and view.norm == "pre" and ref.name.rpartition(".")[0] == weight.name.rpartition(".")[0]:
            yield factor


def _hidden_folds(view: ModelView, factor: Tensor, ref: TensorRef, sublayer: SubLayer | None) -> Iterator[Tensor]:
    """Factors of the residual stream go into what writes it; a head that shares the embedding undoes them before."""
    shape = [-1 if dim == (HIDDEN,) else 1 for dim in ref.layout]
    if writes(view, ref, sublayer):
        yield factor.view(shape)
    elif sublayer is None and view.tied and view.norm == "pre" and re.fullmatch(view.hidden_rule().last, ref.name):
        yield factor.where(factor == 0, 1 / factor).view(shape)
