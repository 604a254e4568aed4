"""Learned masks inside a run: what is checked before, and one plan with the cuts of the steps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.ranks import place
from prunekit.core.registry import GATES
from prunekit.heal.scene import Scene
from prunekit.modeling.load import load_model
from prunekit.pipeline.inputs import chooser, device_of, reads, tokenizer_for
from prunekit.plan.cost import sublayer_cost
from prunekit.plan.layout import choose_layout
from prunekit.plan.require import require_met

if TYPE_CHECKING:
    from collections.abc import Callable

    from prunekit.core.recipe_model import Recipe
    from prunekit.gates._learn import Learned, Task
    from prunekit.plan.plan import Plan
    from prunekit.structure.view import ModelView


def learned_after(
    recipe: Recipe,
    source: ModelView,
    here: ModelView,
    plan: Plan,
    folder: Path,
    work: Path | None,
    progress: Progress = NULL_PROGRESS,
    talk: Callable[[str], None] = lambda text: None,
) -> Learned:
    """What a recipe's `learn` finds in the model that its steps leave.

    Args:
        recipe: settings.
        source: the model before any cut.
        here: as the steps leave it.
        plan: of the steps.
        folder: a checkpoint of `here`, with the block numbers of the source.
        work: folder for training checkpoints; None takes one that is gone at the end.
        progress: bars.
        talk: told in a line what happens now.
    Raises:
        PrunekitError: of the kind that fits.
    """
    from prunekit.gates._learn import learn

    asked = recipe.learn
    if asked is None:
        raise UsageError("the recipe does not say what to learn", hint="add `learn`")
    device, trusted = device_of(recipe), recipe.model.trust_remote_code

    @cache
    def load_teacher() -> Any:
        return load_model(source.checkpoint.folder, asked.dtype, place(device), trusted)

    with ExitStack() as stack:
        where = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prunekit-learn-"))) / "work"
        scene = Scene(
            asked=asked,
            student=folder,
            teacher=source.checkpoint.folder,
            load_teacher=load_teacher,
            tokenizer=tokenizer_for(source, recipe),
            decoder=reads(source) == "text",
            device=device,
            trust_remote_code=trusted,
            choose=None if asked.select is None else chooser(asked.select, load_teacher, asked.seed, talk),
            made_from=json.dumps(plan.to_json(), sort_keys=True),
            progress=progress,
            talk=talk,
        )
        found = learn(scene, task_of(recipe, source, here), where)
    about = found.about
    if about["threshold"]:
        talk(
            f"the learned rule alone removes {about['removed_by_rule']:.1%}, the budget asks for "
            f"{asked.budget.remove:.1%}; the threshold moved to {about['threshold']:.3g}"
        )
    return found


def task_of(recipe: Recipe, source: ModelView, here: ModelView) -> Task:
    """What is to be learned in a model.

    Raises:
        UsageError: without `learn`.
    """
    from prunekit.gates._learn import Task

    if recipe.learn is None:
        raise UsageError("the recipe does not say what to learn", hint="add `learn`")
    of = recipe.learn.budget.of
    return Task(recipe.learn, here, sum(sublayer_cost(source, sublayer, of) for sublayer in source.sublayers))


def check_learning(view: ModelView, recipe: Recipe) -> None:
    """Fails before any work where a recipe asks for masks that cannot be learned.

    Args:
        view: the model before any cut.
        recipe: the recipe.
    Raises:
        UsageError: if the model, the device, a text, a knob or the repair does not do.
        PlanError: if the budget cannot be met by all that can go, or the result not be of the form asked for.
    """
    from prunekit.gates._learn import check, is_dynamic
    from prunekit.pipeline.healing import check_training

    asked = recipe.learn
    if asked is None:
        return
    check_training(view, recipe, asked)
    check(asked, reads(view) == "text")
    if recipe.repair is not None and GATES.get(asked.method)(**asked.knobs).trains_weights:
        raise UsageError(
            "`repair` does not go with trained weights",
            why="it would fit the dense model's matrices in the place of those that `learn` trained",
            hint="leave `repair` out, or learn masks alone: `method: vib`, `variant: faster`",
        )
    if is_dynamic(asked):
        _check_dynamic(view, recipe)
    elif not recipe.steps:
        _rehearse(recipe, view)


def _check_dynamic(view: ModelView, recipe: Recipe) -> None:
    """Fails where units are to be chosen for each input and something else asks for another model.

    Raises:
        UsageError: for what does not go together.
        PlanError: if the budget cannot be met.
    """
    from prunekit.core.registry import GATES
    from prunekit.gates._learn import check_dynamic

    asked = recipe.learn
    others = [name for name in ("repair", "heal", "vocab") if getattr(recipe, name) is not None]
    others += ["export.formats: " + name for name in recipe.export.formats if name != "safetensors"]
    if asked is None or others:
        name = asked.method if asked is not None else ""
        raise UsageError(
            f"`learn.method: {name}` does not go with {', '.join(f'`{other}`' for other in others)}",
            why="it chooses units for each input, of a model that stays as it is",
            hint="take them out; cut and heal first, then learn to choose in the folder written",
        )
    check_dynamic(asked)
    task = task_of(recipe, view, view)
    task.check()
    GATES.get(asked.method)(**asked.knobs).gates(task)


def _rehearse(recipe: Recipe, view: ModelView) -> None:
    """Chooses by chance, which meets the budget and has the layout of what is learned.

    Raises:
        PlanError: if that is not possible.
        UsageError: if a knob does not fit the model.
    """
    import torch

    from prunekit.gates._fold import plan_of

    task = task_of(recipe, view, view)
    noise = torch.rand(sum(len(each.units) for each in task.places), generator=torch.Generator().manual_seed(0))
    plan = plan_of(task, task.chooser.choose(noise).keep)
    require_met(recipe, view, plan)
    choose_layout(view, plan, recipe.export.layout)
    GATES.get(task.asked.method)(**task.asked.knobs).gates(task)


def work_folder(output: Path) -> Path:
    """Where the checkpoints of a learning lie until the output is in its place."""
    return output.with_name(f".{output.name}.learn")


def notes_of(about: Mapping[str, Any]) -> list[str]:
    """What was learned, in a sentence or two."""
    if not about:
        return []
    from prunekit.pipeline.healing import texts_of

    if about.get("dynamic"):
        first = f" after the first {about['tokens_first']} tokens of a sequence" if about["tokens_first"] else ""
        return [
            f"Dynamic: shapes unchanged, no parameter saved. Predictors by {about['method']} choose "
            f"{', '.join(about['remove'])} for each input{first}: {about['steps_done']} steps, {about['tokens']:,} "
            f"tokens; data: {texts_of(about)}. {about['removed']:.1%} of the blocks' {about['budget']['of']} are not "
            f"computed for one sequence; {about['foretold']:.1%} of the units were foretold right. Figures after are "
            "measured with the chosen units alone."
        ]
    moved = "" if not about["threshold"] else f" Threshold moved to {about['threshold']:.3g}."
    return [
        f"Masks by {about['method']} over {', '.join(about['remove'])}: {about['steps_done']} steps, "
        f"{about['tokens']:,} tokens; data: {texts_of(about)}. Removed {about['removed']:.1%} of the blocks' "
        f"{about['budget']['of']}, by the learned rule alone {about['removed_by_rule']:.1%}.{moved}"
    ]
