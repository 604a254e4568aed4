"""What a run tells of itself in its output folder: manifest, recipe, model card, layer map, report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.files import write_json, write_text
from prunekit.core.progress import Progress
from prunekit.pipeline import learning, pattern
from prunekit.pipeline.healing import notes_of
from prunekit.pipeline.origins import derived, source_digests

if TYPE_CHECKING:
    from prunekit.core.recipe_model import Recipe
    from prunekit.pipeline.carry_out import Result

MANIFEST, RECIPE, ONNX = "prunekit.json", "recipe.yaml", "onnx"


def write_story(recipe: Recipe, folder: Path, result: Result, progress: Progress) -> None:
    """The manifest, the recipe with every default, the model card, the layer map and the HTML report."""
    from torch import get_num_threads

    from prunekit.report.card import read_inherited
    from prunekit.report.folder import versions, write_report

    made, data = result.made, result.to_json()
    write_recipe(recipe, folder)
    source = made.source
    manifest = {
        "schema": 1,
        "versions": versions(),
        "threads": get_num_threads(),
        "source": {
            "name": source.name,
            "kind": source.kind,
            "revision": source.revision,
            "sha256": source_digests(made.view, progress),
            "card": read_inherited(made.view.checkpoint.folder),
        },
        "accepted": all(entry["ok"] for entry in result.expectations),
        **derived(recipe, made),
        **{key: value for key, value in data.items() if key != "output"},
        "notes": [
            *_notes(recipe),
            *pattern.notes_of(recipe),
            *learning.notes_of(made.learn),
            *notes_of(result.heal),
            *_latency_notes(result.latency),
        ],
    }
    write_json(folder / MANIFEST, manifest)
    write_report(folder)


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Writes the recipe with every default into an output folder."""
    import yaml

    text = yaml.safe_dump(recipe.effective(), sort_keys=False, allow_unicode=True, width=110)
    write_text(folder / RECIPE, text)


def _notes(recipe: Recipe) -> list[str]:
    """How the result was repaired and the figures were measured, in sentences."""
    asked, notes = recipe.evaluate, []
    if recipe.repair is not None:
        r = recipe.repair.calibrate
        fitted = f"{r.sequences} sequences of {r.length_tokens} tokens of `{Path(r.data).name}`"
        notes.append(f"Repaired by {recipe.repair.method}, fitted on {fitted}; shapes are those of the cut.")
    if asked.perplexity is not None:
        p = asked.perplexity
        stride = f", a window every {p.stride_tokens}" if p.stride_tokens else ""
        notes.append(f"Perplexity: {p.sequences} windows of {p.length_tokens} tokens of `{Path(p.data).name}`{stride}.")
    if asked.kl is not None:
        k = asked.kl
        where = f"{k.sequences} windows of {k.length_tokens} tokens of `{Path(k.data).name}`"
        notes.append(f"KL: mean over the tokens of {where}, against the model before the cut.")
    if asked.embedding is not None:
        e = asked.embedding
        notes.append(f"Cosine: {e.sequences} inputs of `{Path(e.data).name}`, against the model before the cut.")
    if asked.latency is not None:
        x = asked.latency
        notes.append(
            f"Speed: batch {x.batch}, {x.prompt_tokens} tokens read, {x.new_tokens} written, median of {x.repeats}."
        )
    for entry in asked.tasks or ():
        options = ", ".join(f"{key} {value}" for key, value in entry.options.items())
        notes.append(f"`{entry.task}`: {options or 'default options'}.")
    return notes


def _latency_notes(latency: Mapping[str, Any]) -> list[str]:
    if not latency:
        return []
    shares = ""
    if "measured_share" in latency:
        predicted, measured = latency["predicted_share"], latency["measured_share"]
        shares = f"; of the dense model's time {predicted:.3f} predicted, {measured:.3f} measured"
    what = f"One pass of {latency['batch']} x {latency['tokens']} tokens in {latency['on']}"
    return [
        f"{what}: at most {latency['target_ms']:,.4g} ms asked for, {latency['predicted_ms']:,.4g} ms predicted from "
        f"measured sub-layers, {latency['measured_ms']:,.4g} ms measured (fastest pass; predicted to measured "
        f"{latency['predicted_to_measured']:.2f}" + shares + ")."
    ]
