"""The readable part of an output folder: layer map image, model card and HTML report, made from its manifest."""

from __future__ import annotations

from importlib import metadata as packages
from pathlib import Path

from prunekit.core.files import write_text
from prunekit.report.card import card_facts, model_card
from prunekit.report.html import html_report
from prunekit.report.layer_map_image import write_layer_map
from prunekit.report.run import read_auto_class, read_run

CARD, LAYER_MAP, REPORT = "README.md", "layer_map.png", "report.html"
_VERSIONED = ("prunekit", "torch", "transformers", "safetensors", "onnx", "onnxruntime")


def write_report(folder: Path) -> None:
    """Writes `layer_map.png`, `README.md` and `report.html` into an output folder.

    Args:
        folder: holds `prunekit.json` and `config.json`.
    Raises:
        UsageError: if the manifest cannot be read.
    """
    run = read_run(folder)
    write_layer_map(run.rows, folder / LAYER_MAP, run.title)
    write_text(folder / CARD, model_card(card_facts(run, read_auto_class(folder), LAYER_MAP, REPORT)))
    write_text(folder / REPORT, html_report(run))


def versions() -> dict[str, str]:
    """Versions of the packages that made the folder, those installed only."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    return found
