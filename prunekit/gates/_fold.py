"""From gates to a cut: the plan, and the factors folded into the matrices that lead away from the units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunekit.checkpoint.reader import torch_dtypes
from prunekit.gates._places import channel_units
from prunekit.plan.plan import Plan
from prunekit.surgery.slices import cuts_of, take

if TYPE_CHECKING:
    from prunekit.checkpoint.reader import Checkpoint
    from prunekit.gates._learn import Task
    from prunekit.gates._places import Place
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
            kept[f"{place.address}.{place.kind}"] = stays
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
    cuts = cuts_of(plan)
    by_name: dict[str, list[tuple[Place, Tensor]]] = {}
    for place in task.places:
        for name in _folds_into(view, place):
            by_name.setdefault(name, []).append((place, factors[place.slice]))
    found = {}
    for sublayer in view.sublayers:
        if sublayer.address in plan.drop:
            continue
        sizes = view.sizes(sublayer)
        for ref in sublayer.tensors:
            if ref.name not in names or not (every or ref.name in by_name):
                continue
            value = parameters[names[ref.name]].detach().cpu().float()
            for place, factor in by_name.get(ref.name, ()):
                value = value * _spread(view, place, factor, ref)
            value = take(value, ref.layout, sizes, cuts.get(sublayer.address, {}))
            found[ref.name] = value.to(torch_dtypes()[checkpoint.tensors[ref.name].dtype]).contiguous()
    if every:
        for ref in view.outer:
            if ref.name in names:
                value = parameters[names[ref.name]].detach()
                found[ref.name] = value.to("cpu", torch_dtypes()[checkpoint.tensors[ref.name].dtype]).contiguous()
    return found


def _folds_into(view: ModelView, place: Place) -> list[str]:
    """Tensors that take a place's factors: the output projection, and its bias where a whole sub-layer has one."""
    if not place.axis and view.norm == "post":
        return []
    sublayer = view.sublayer(place.address)
    weight = view.output(sublayer).name
    bias = weight.removesuffix("weight") + "bias"
    return [weight, *(ref.name for ref in sublayer.tensors if ref.name == bias and not place.axis)]


def _spread(view: ModelView, place: Place, factor: Tensor, ref: Any) -> Tensor:
    """A place's factors in the shape of a tensor, ready to multiply."""
    if not place.axis:
        return factor
    sublayer = view.sublayer(place.address)
    output = view.output(sublayer)
    channels = factor[channel_units(output, place.axis, view.sizes(sublayer))]
    return channels if output.layout[0] == ("hidden",) else channels[:, None]
