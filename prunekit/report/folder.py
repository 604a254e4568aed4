"""The readable part of an output folder: layer map image and model card, made from what a run knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.plan.layout import auto_class
from prunekit.report.card import CardFacts, model_card, read_metadata
from prunekit.report.layer_map import details, layer_map, summary
from prunekit.report.layer_map_image import write_layer_map
from prunekit.report.table import lines

if TYPE_CHECKING:
    from prunekit.plan.plan import Plan
    from prunekit.structure.view import ModelView

CARD, LAYER_MAP = "README.md", "layer_map.png"
_VERSIONED = ("prunekit", "torch", "transformers", "safetensors", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Story:
    """What a run knows beyond the model and the plan.

    Args:
        name: heading of the card and title of the map; the source's name where the recipe has none.
        source: the model as the recipe names it.
        layout: `stock`, `repacked` or `heterogeneous`.
        loads: where the folder loads: target and how.
        before: measurements of the source model, keys as in `table.MEASURES`.
        after: the same for the cut model.
        recipe: the effective recipe as YAML.
        prompt: what the samples continue.
        notes: plain sentences under the table.
        onnx: sub-folder of the ONNX files, "" for none.
        missed: limits of `expect` that the result does not keep, as sentences.
    """

    name: str
    source: str
    layout: str
    loads: Mapping[str, str]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    recipe: str
    prompt: str = ""
    notes: Sequence[str] = ()
    onnx: str = ""
    missed: Sequence[str] = ()


def write_report(folder: Path, view: ModelView, plan: Plan, story: Story) -> None:
    """Writes `layer_map.png` and `README.md` into an output folder.

    Args:
        folder: the output folder; must exist.
        view: the model before the cut; its folder may hold a card whose licence and language are taken over.
        plan: the cuts.
        story: the rest.
    """
    rows = layer_map(view, plan)
    write_layer_map(rows, folder / LAYER_MAP, story.name)
    samples = {"before": story.before.get("sample"), "after": story.after.get("sample")}
    facts = CardFacts(
        title=story.name,
        source=story.source,
        source_card=read_metadata(view.checkpoint.folder),
        auto_class=auto_class(view.config.get("architectures") or ()),
        layout=story.layout,
        loads=story.loads,
        removed=[summary(rows), *details(rows)],
        measured=lines(story.before, story.after),
        notes=story.notes,
        prompt=story.prompt,
        samples={name: text for name, text in samples.items() if text},
        recipe=story.recipe,
        versions=versions(),
        layer_map=LAYER_MAP,
        onnx=story.onnx,
        missed=story.missed,
    )
    (folder / CARD).write_text(model_card(facts), encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of the packages that made the folder, those installed only."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    return found
