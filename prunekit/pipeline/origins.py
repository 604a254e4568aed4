"""What a folder was made from, as its manifest records it: inputs with their digests, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prunekit.calibrate.texts import data_digest
from prunekit.core.files import sha256_files
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.plan.loads import loads
from prunekit.report.layer_map import layer_map
from prunekit.surgery.sidecar import model_files

if TYPE_CHECKING:
    from prunekit.core.recipe_model import Recipe
    from prunekit.pipeline.choose import Made
    from prunekit.structure.view import ModelView


def source_digests(view: ModelView, progress: Progress = NULL_PROGRESS) -> dict[str, str]:
    """SHA-256 of every file of the source that a run reads, by name: configuration, weights, tokenizer and the like."""
    weights = sorted({info.file for info in view.checkpoint.tensors.values()})
    others = (name.as_posix() for name in model_files(view.checkpoint.folder))
    names = dict.fromkeys(["config.json", *weights, *others])
    return sha256_files(view.checkpoint.folder, list(names), "digesting the source", progress)


def data_digests(recipe: Recipe) -> dict[str, dict[str, str | None]]:
    """Texts and other files that decide what a recipe writes, by their place in it: `name` and `sha256`.

    Data that is only measured on is left out. `sha256` is None for what is no file, such as noise, and where the file
    is missing.
    """
    return {place: {"name": name, "sha256": data_digest(name)} for place, name in _named(recipe)}


def _named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "calibrate.data", recipe.calibrate.data
    for number, step in enumerate(recipe.steps):
        if isinstance(step.by.knobs.get("file"), str):
            yield f"steps.{number}.by.file", step.by.knobs["file"]
    if recipe.vocab is not None:
        yield "vocab.data", recipe.vocab.data
    if recipe.repair is not None:
        yield "repair.calibrate.data", recipe.repair.calibrate.data
    for section in (part for part in (recipe.learn, recipe.heal) if part is not None):
        for number, text in enumerate(section.data):
            yield f"{section.section}.data.{number}.data", text.data
            if text.prompts is not None:
                yield f"{section.section}.data.{number}.prompts", text.prompts


def derived(recipe: Recipe, made: Made) -> dict[str, Any]:
    """The part of a manifest that the recipe and its inputs decide, digests of the source apart."""
    return {
        "inputs": data_digests(recipe),
        "recipe": recipe.effective(),
        "plan": made.plan.to_json(),
        "orders": [order.to_json() for order in made.orders],
        **({"learn": dict(made.learn)} if made.learn else {}),
        **({"vocab": dict(made.vocab)} if made.vocab else {}),
        **({"repair": dict(made.repair)} if made.repair else {}),
        "layout": made.layout.kind,
        "loads": loads(made.view, made.plan, made.layout),
        "layer_map": [row.to_json() for row in layer_map(made.view, made.plan)],
    }
