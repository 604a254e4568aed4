"""The files of a model besides weights and configuration: tokenizer, chat template, processors, licence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from prunekit.core.errors import SurgeryError
from prunekit.core.files import write_json

_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".vocab", ".py")
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "COPYRIGHT", "USE_POLICY")
# Written anew, true of the source only, or the table of contents of weights.
_NOT = re.compile(
    r"config\.json|prunekit\.json|modeling_prunekit\.py|trainer_state\.json|.*_results\.json|.*\.index\.json"
)
# Folders inside a model's folder that belong to it: named chat templates, and the modules of sentence-transformers.
_FOLDERS = re.compile(r"additional_chat_templates|\d+_\w+")


def model_files(folder: Path) -> tuple[Path, ...]:
    """Files to copy along with a model, relative to its folder.

    Args:
        folder: the source; other formats, training state and model cards in it are left out.
    Raises:
        SurgeryError: if one of the files is a link that leaves the folder.
    """
    return tuple(sorted(path.relative_to(folder) for path in _wanted(folder)))


def write_model_files(source: Path, files: tuple[Path, ...], folder: Path) -> None:
    """Copies files of `model_files` into a new folder, with the modes of new files."""
    for name in files:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target)


def write_pooled_width(folder: Path, before: int, after: int) -> None:
    """Tells the pooling of sentence-transformers, where there is one, of a narrower residual stream."""
    for file in folder.glob("*/config.json") if after != before else ():
        config = json.loads(file.read_text("utf-8"))
        if isinstance(config, dict) and config.get("in_features") == before:
            what = f"`{file.parent.name}` reads {before} hidden channels and cannot be cut"
            raise SurgeryError(what, why="it belongs to the sentence encoder, not to the model")
        if isinstance(config, dict) and config.get("word_embedding_dimension") == before:
            write_json(file, {**config, "word_embedding_dimension": after})


def _wanted(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        inside = [path]
        if path.is_dir():
            inside = list(path.iterdir()) if _FOLDERS.fullmatch(path.name) else []
        for file in inside:
            weights = file.suffix == ".safetensors" and file.parent != folder
            if (_is_text(file.name, file.parent == folder) or weights) and file.is_file():
                _require_inside(folder, file)
                yield file


def _is_text(name: str, at_top: bool) -> bool:
    if name.startswith(".") or (at_top and _NOT.fullmatch(name)):
        return False
    return name.endswith(_SUFFIXES) or name.upper().startswith(_LEGAL)


def _require_inside(folder: Path, file: Path) -> None:
    """Links may stay in the folder, or lead from `snapshots/<commit>` to `blobs` as the hub's cache has them."""
    home, real = folder.resolve(), file.resolve()
    allowed = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(place) for place in allowed):
        name = file.relative_to(folder)
        raise SurgeryError(
            f"`{name}` is a link that leaves the folder",
            why=f"it leads to `{real}`",
            hint="put a copy there",
            at=str(file),
        )
