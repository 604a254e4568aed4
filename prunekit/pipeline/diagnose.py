"""Measurements that explain a model: which heads do what, where it is sensitive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunekit.checkpoint.sources import resolve
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.recipe import parse_recipe
from prunekit.core.types import Panel
from prunekit.pipeline.choose import Bench, Talk, silent
from prunekit.pipeline.inputs import reads, require_one_stack
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView


def diagnose(
    model: dict[str, Any],
    calibrate: dict[str, Any],
    names: Sequence[str] = (),
    progress: Progress = NULL_PROGRESS,
    talk: Talk = silent,
) -> list[Panel]:
    """What the diagnostics say of a model.

    Args:
        model: the `model` section of a recipe.
        calibrate: the `calibrate` section: what the model is run on; without `data` images are noise.
        names: diagnostics; none takes all.
        progress: bars.
        talk: told in a line what happens now.
    Raises:
        PrunekitError: of the kind that fits, before the model is loaded where it can be known then.
    """
    from prunekit.evaluate.diagnostics._subject import DIAGNOSTICS, Subject

    chosen = [(name, DIAGNOSTICS.get(name)) for name in names or DIAGNOSTICS.names()]
    # Loading reads two sections of a recipe; the step is there because a recipe must have one.
    step = {"remove": "blocks", "by": {"score": "last_k"}, "budget": {"units": 1}}
    recipe = parse_recipe({"schema": 1, "model": model, "calibrate": calibrate, "steps": [step]}, [])
    source = resolve(recipe.model.source, recipe.model.revision, progress=progress)
    view = ModelView.open(source.folder)
    require_one_stack(view, "diagnostics", "")
    if reads(view) == "images" and "data" not in calibrate:
        noise = recipe.calibrate.model_copy(update={"data": "noise"})
        recipe = recipe.model_copy(update={"calibrate": noise})
    panels: list[Panel] = []
    with Bench(recipe, view, Plan.make(view), progress) as bench:
        inputs = bench.batch
        decoder = reads(view) == "text"
        subject = Subject(bench.stack, inputs, decoder, recipe.calibrate.seed)
        for name, diagnostic in chosen:
            talk(name.replace("_", " "))
            panels += diagnostic().measure(subject, progress)
    return panels
