"""Heads of cross-attention that a generation configuration names, for the times of words, in a cut model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.core.errors import SurgeryError
from prunekit.core.files import write_json
from prunekit.surgery.vocabulary import GENERATION

if TYPE_CHECKING:
    from prunekit.plan.plan import Plan
    from prunekit.structure.view import ModelView

_KEY = "alignment_heads"


def write_alignment(folder: Path, view: ModelView, plan: Plan) -> None:
    """Numbers the heads anew in a written folder; those that went are left out, and the list with the last of them.

    An entry is the number of a cross-attention, counted over those that the decoder has, and of a head in it.

    Raises:
        SurgeryError: if the list is damaged.
    """
    file = folder / GENERATION
    crosses = [block.cross_attention for block in view.blocks if block.cross_attention is not None]
    if not crosses or not file.is_file():
        return
    data = json.loads(file.read_text("utf-8"))
    heads = data.get(_KEY) if isinstance(data, dict) else None
    if heads is None:
        return
    left = [cross for cross in crosses if cross.address not in plan.drop]
    new: dict[tuple[int, int], list[int]] = {}
    for number, cross in enumerate(left):
        kept = plan.keep.get(f"{cross.address}.kv_groups", range(cross.widths["kv"]))
        new |= {(crosses.index(cross), head): [number, place] for place, head in enumerate(kept)}
    try:
        found = [new[layer, head] for layer, head in heads if (layer, head) in new]
    except (TypeError, ValueError) as error:
        raise SurgeryError(f"`{_KEY}` is damaged", why=str(error), at=GENERATION) from error
    write_json(file, {**data, _KEY: found} if found else {key: data[key] for key in data if key != _KEY})
