"""The repair of a recipe: new values for tensors that stay, fitted once the whole plan is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from prunekit.checkpoint.reader import torch_dtypes
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.registry import REPAIRS
from prunekit.pipeline.inputs import device_of, dtype_of, model_batch, require_one_stack, tokenizer_for
from prunekit.surgery.slices import cuts_of, take

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.core.recipe_model import Recipe
    from prunekit.pipeline.choose import Made
    from prunekit.plan.plan import Plan
    from prunekit.repair._fit import Projection
    from prunekit.structure.view import ModelView


def with_repair(recipe: Recipe, made: Made, progress: Progress = NULL_PROGRESS) -> Made:
    """The same with repaired tensors, where the recipe asks for them.

    Args:
        recipe: says how to load the model, and what to fit on.
        made: the plan.
        progress: shown as sub-layers.
    Raises:
        PrunekitError: where the data does not do, or the family cannot be repaired.
    """
    if recipe.repair is None:
        return made
    from prunekit.calibrate.stack import Stack
    from prunekit.modeling.load import load_model

    view, asked = made.view, recipe.repair
    inputs = repair_inputs(recipe, view)
    device = device_of(recipe)
    dtype = dtype_of(recipe, view, device)
    stack = Stack(load_model(view.checkpoint.folder, dtype, device, recipe.model.trust_remote_code))
    method = REPAIRS.get(asked.method)(**asked.knobs)
    found = method.fit(stack, inputs, frozenset(made.plan.drop), kept_channels(view, made.plan), progress)
    about: dict[str, Any] = {
        "method": asked.method,
        "knobs": asdict(method),
        "calibrate": asked.calibrate.model_dump(),
        "error": found.error,
    }
    return replace(made, repaired=found.projections, repair=about)


def repair_inputs(recipe: Recipe, view: ModelView) -> dict[str, Tensor]:
    """What a recipe's repair is fitted on; empty without one.

    Raises:
        UsageError: where the data does not do.
        PlanError: where the method does not go with the family or with what is removed.
    """
    if recipe.repair is None:
        return {}
    require_one_stack(view, "`repair`")
    view.require_plain("`repair`")
    kinds = [*(step.remove for step in recipe.steps), *(recipe.learn.remove if recipe.learn else ())]
    REPAIRS.get(recipe.repair.method).require(view, kinds)
    asked = recipe.repair.calibrate
    return model_batch(view, tokenizer_for(view, recipe), asked, asked.seed)


def kept_channels(view: ModelView, plan: Plan) -> dict[str, Tensor]:
    """For each narrowed sub-layer the channels of its output projection's input that stay, int64."""
    import torch

    found = {}
    for address, keep in cuts_of(plan).items():
        sublayer = view.sublayer(address)
        ref = view.output(sublayer)
        side = next(dim for dim in ref.layout if dim != ("hidden",))
        sizes = view.sizes(sublayer)
        width = ref.shape[ref.layout.index(side)]
        found[address] = take(torch.arange(width), (side,), sizes, keep)
    return found


def as_stored(view: ModelView, repaired: Mapping[str, Projection]) -> dict[str, Tensor]:
    """Repaired output projections as the files hold them: names, types, and [in, out] where the family has it so."""
    found = {}
    for address, projection in repaired.items():
        sublayer = view.sublayer(address)
        ref = view.output(sublayer)
        types = {part.name: torch_dtypes()[part.dtype] for part in sublayer.tensors}
        weight = projection.weight if ref.layout[0] == ("hidden",) else projection.weight.T
        found[ref.name] = weight.to(types[ref.name]).contiguous()
        if projection.bias is not None:
            name = ref.name.removesuffix("weight") + "bias"
            found[name] = projection.bias.to(types[name])
    return found


def put_into(model: Any, view: ModelView, repaired: Mapping[str, Projection]) -> None:
    """Gives a loaded dense model the repaired output projections, rounded as they are stored."""
    from prunekit.modeling.modeling_prunekit import blocks_of, output_projection

    stored = as_stored(view, repaired)
    for address in repaired:
        _, number, kind = address.split(".")
        layer: Any = output_projection(blocks_of(model)[int(number)], kind)
        name = view.output(view.sublayer(address)).name
        layer.weight.data.copy_(stored[name])
        if layer.bias is not None:
            layer.bias.data.copy_(stored[name.removesuffix("weight") + "bias"])
