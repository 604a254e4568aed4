"""Healing inside a run: what is trained by what, and the healed weights in the place of the cut ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.ranks import place
from prunekit.heal._shards import whole
from prunekit.heal.run import Healed, check, heal
from prunekit.heal.scene import Scene, matches
from prunekit.modeling.load import load_model, load_tokenizer, to_float64
from prunekit.pipeline.choose import Talk, silent
from prunekit.pipeline.inputs import chooser, device_of, reads, require_one_stack, tokenizer_for
from prunekit.pipeline.measure import subject_of

if TYPE_CHECKING:
    from prunekit.core.recipe_heal import Heal, Training
    from prunekit.core.recipe_model import Recipe
    from prunekit.export.verify import Reference
    from prunekit.plan.layout import Pair
    from prunekit.structure.view import ModelView

# A reference in float64 takes 8 bytes a parameter; above this the check in fresh processes goes without one.
REFERENCE_PARAMS = 400_000_000
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def work_folder(output: Path) -> Path:
    """Where the checkpoints of a healing lie until it is finished."""
    return output.with_name(f".{output.name}.heal")


def check_healing(view: ModelView, recipe: Recipe) -> None:
    """Fails before any work where a recipe asks for healing that cannot be.

    Args:
        view: the dense model.
        recipe: the recipe.
    Raises:
        UsageError: if the model, the device or a text does not do.
        HealError: if a package is missing.
    """
    if recipe.heal is None:
        return
    check_training(view, recipe, recipe.heal)
    check(recipe.heal, reads(view) == "text")


def check_training(view: ModelView, recipe: Recipe, asked: Training) -> None:
    """Fails where a model cannot be trained as a section of the recipe asks.

    Raises:
        UsageError: if the model or the device does not do.
        PlanError: if its matrices are quantised.
    """
    kind, name = reads(view), f"`{asked.section}`"
    require_one_stack(view, name)
    view.require_plain(name)
    if kind == "images":
        raise UsageError(f"{name} needs a model that reads text", why=f"`{recipe.model.source}` reads images")
    if kind == "text" and view.head is None:
        raise UsageError(f"{name} needs the head of a model that writes text", why="the checkpoint has the base alone")
    device = device_of(recipe)
    if device.startswith("cuda:"):
        hint = f"use `cuda`, and CUDA_VISIBLE_DEVICES={device.partition(':')[2]} in the environment"
        raise UsageError(f"training cannot be put on `{device}`", why="it takes the first device there is", hint=hint)
    subject_of(recipe, view, None).require_positions(
        asked.length_tokens, f"a sequence of {name}", hint=f"lower `{asked.section}.length_tokens`"
    )


def scene_of(
    recipe: Recipe,
    view: ModelView,
    student: Path,
    pairs: Sequence[Pair] | None,
    dense: Any = None,
    made_from: str | None = None,
    progress: Progress = NULL_PROGRESS,
    talk: Talk = silent,
) -> Scene:
    """What is healed by what.

    Args:
        recipe: settings.
        view: the dense model.
        student: folder of the cut model.
        pairs: source blocks of each of its blocks; None where nobody knows.
        dense: the dense model where it is in memory already; used if its type is the one asked for.
        made_from: see `Scene`.
        progress: bars.
        talk: told in a line what happens now.
    Raises:
        UsageError: without `heal`.
    """
    asked = _asked(recipe)
    device, folder, trusted = device_of(recipe), view.checkpoint.folder, recipe.model.trust_remote_code

    @cache
    def load_teacher() -> Any:
        if dense is not None and str(dense.dtype) == f"torch.{asked.dtype}":
            return dense
        with whole():
            return load_model(folder, asked.dtype, place(device), trusted)

    return Scene(
        asked=asked,
        student=student,
        teacher=folder,
        load_teacher=load_teacher,
        tokenizer=tokenizer_for(view, recipe),
        decoder=reads(view) == "text",
        device=device,
        matches=None if pairs is None else matches(pairs, len(view.blocks)),
        trust_remote_code=trusted,
        choose=None if asked.select is None else chooser(asked.select, load_teacher, asked.seed, talk),
        made_from=made_from,
        progress=progress,
        talk=talk,
    )


def _asked(recipe: Recipe) -> Heal:
    if recipe.heal is None:
        raise UsageError("the recipe does not say how to heal", hint="add `heal: {method: distill}`")
    return recipe.heal


def healed_in_place(scene: Scene, work: Path, max_shard_bytes: int) -> tuple[Reference | None, Mapping[str, Any]]:
    """Heals a folder's model and puts its weights there.

    Args:
        scene: the student's folder is written to.
        work: for checkpoints.
        max_shard_bytes: largest weight file.
    Returns:
        What the result must compute, None if it is too large; and what the healing says about itself.
    """
    healed = heal(scene, work)
    folder = scene.student
    fresh = folder / ".healed"
    fresh.mkdir()
    changed = healed.write(fresh, max_shard_bytes, scene.progress)
    for pattern in _WEIGHTS:
        for file in folder.glob(pattern):
            file.unlink()
    for file in fresh.iterdir():
        file.rename(folder / file.name)
    fresh.rmdir()
    return reference_of(healed, folder), {**healed.about, "changed_tensors": changed}


def reference_of(healed: Healed, folder: Path) -> Reference | None:
    """Outputs of the healed model in memory, in float64; None if that would take too much of it."""
    from prunekit.export.verify import make_reference

    if sum(parameter.numel() for parameter in healed.model.parameters()) > REFERENCE_PARAMS:
        return None
    return make_reference(to_float64(healed.model), load_tokenizer(folder), "the healed model in memory")


def notes_of(about: Mapping[str, Any]) -> list[str]:
    """How a model was healed, in a sentence or two."""
    if not about:
        return []
    notes = [
        f"Healed by {about['method']} ({about['train']}): {about['steps_done']} steps, {about['tokens']:,} tokens, "
        f"peak learning rate {about['lr']:g}; data: {texts_of(about)}, {about['held_out_sequences']} of them held out."
    ]
    if "held_out_before" in about:
        a, b = about["held_out_before"], about["held_out_after"]
        notes.append(f"Loss on the held-out part: {a:.4f} before, {b:.4f} after (step {about['best_step']}).")
    return notes


def texts_of(about: Mapping[str, Any]) -> str:
    """What was trained on, in words."""
    return ", ".join(
        f"{count} sequences of `{Path(text['data']).name}`"
        for text, count in zip(about["data"], about["sequences_of"], strict=True)
    )
