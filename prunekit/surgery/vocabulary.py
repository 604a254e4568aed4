"""Vocabulary rows that go: which tensors have them, and the ids in a model's configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.checkpoint.vocabulary import Vocabulary
from prunekit.core.errors import SurgeryError
from prunekit.core.files import write_json
from prunekit.plan.plan import VOCAB

if TYPE_CHECKING:
    from prunekit.plan.plan import Plan
    from prunekit.structure.view import ModelView

GENERATION = "generation_config.json"
_IDS = re.compile(r"(?:.*_)?token_ids?|.*_token_index")
# Lists of ids that are not names of special tokens; what they mean without some tokens nobody says.
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "bad_words_ids", "sequence_bias")


def special_ids(view: ModelView) -> frozenset[int]:
    """Ids that the configuration and the generation configuration name.

    Raises:
        SurgeryError: where they list ids that cannot be numbered anew.
    """
    found: set[int] = set()
    for data in (view.config, _generation(view.checkpoint.folder)):
        _renumbered(data, None, found)
    return frozenset(number for number in found if 0 <= number < view.vocabulary)


def cut_ids(config: Mapping[str, Any], view: ModelView, plan: Plan) -> dict[str, Any]:
    """A configuration with the size of what stays of the vocabulary, and its ids numbered anew."""
    kept = plan.keep.get(VOCAB)
    if kept is None:
        return dict(config)
    changed: dict[str, Any] = _renumbered(config, {old: new for new, old in enumerate(kept)}, set())
    if view.section and view.section in changed:
        changed[view.section] = {**changed[view.section], "vocab_size": len(kept)}
    if not view.section or "vocab_size" in changed:
        changed["vocab_size"] = len(kept)
    return changed


def write_vocabulary(source: Path, folder: Path, kept: Sequence[int]) -> None:
    """Replaces the tokenizer's files and the generation configuration in a folder by those of what stays."""
    Vocabulary.read(source).write(folder, kept)
    data = _generation(source)
    if data:
        write_json(folder / GENERATION, _renumbered(data, {old: new for new, old in enumerate(kept)}, set()))


def _generation(folder: Path) -> dict[str, Any]:
    file = folder / GENERATION
    try:
        found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise SurgeryError(f"`{GENERATION}` is damaged", why=str(error)) from error
    return found if isinstance(found, dict) else {}


def _renumbered(data: Any, new: Mapping[int, int] | None, found: set[int], key: str = "") -> Any:
    """The same data with ids numbered anew; collects them in `found`, and only that where `new` is None."""
    if isinstance(data, Mapping):
        odd = next((name for name in _LISTS if data.get(name)), None)
        if odd is not None:
            raise SurgeryError(f"`{odd}` cannot follow a smaller vocabulary", hint="take it out of the configuration")
        return {name: _renumbered(value, new, found, name) for name, value in data.items()}
    if not _IDS.fullmatch(key):
        return data
    if isinstance(data, list):
        return [_renumbered(value, new, found, key) for value in data]
    if isinstance(data, int) and not isinstance(data, bool):
        found.add(data)
        return data if new is None else new.get(data, data)
    return data
