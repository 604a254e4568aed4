"""Architectures as data: which tensors a block holds, and which axes their dimensions factor into."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from prunekit.core.errors import StructureError

PREFIX = "prunekit_"
_FOLDER = Path(__file__).with_name("archs")
Layout = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Pattern:
    """A tensor of an architecture.

    Args:
        layout: for each dimension the axes it factors into, outermost first; None where any shape will do.
        optional: whether a checkpoint may lack it.
    """

    layout: Layout | None
    optional: bool = False


@dataclass(frozen=True)
class Architecture:
    """One file of `archs/`.

    Args:
        name: of the file.
        model_types: `model_type` of the configurations it describes.
        norm: `pre` where each sub-layer normalises its input and adds its output to the residual stream, `post` where
            the sum is normalised.
        decoder: whether it keeps keys and values of earlier tokens.
        keys: names of the configuration's keys by role: blocks, hidden, heads, kv_heads, head_width, ffn.
        lists: configuration lists with an entry a block, and the sub-layer that an entry speaks of.
        stock_widths: width kinds that a stock configuration can say when all blocks are alike.
        block: pattern of tensor names up to the block's number.
        sublayers: tensors of `attention` and `ffn` by the name after the block's number; the last matrix of each leads
            back to the residual stream.
        outer: tensors outside blocks by pattern.
        ignored: patterns of stored buffers that are no weights.
        head: pattern of the output matrix, "" where there is none.
        table: pattern of the token embedding, "" where there is none.
        projection: pattern of another matrix that every token passes outside blocks, "" where there is none.
    """

    name: str
    model_types: tuple[str, ...]
    norm: Literal["pre", "post"]
    decoder: bool
    keys: Mapping[str, str]
    lists: Mapping[str, str]
    stock_widths: tuple[str, ...]
    block: str
    sublayers: Mapping[str, Mapping[str, Pattern]]
    outer: Mapping[str, Pattern]
    ignored: tuple[str, ...]
    head: str
    table: str
    projection: str

    def split(self, name: str) -> tuple[int, str] | None:
        """Block number and rest of a tensor's name; None for a tensor outside blocks."""
        match = re.fullmatch(rf"{self.block}(\d+)\.(.+)", name)
        return (int(match[1]), match[2]) if match else None

    def renumbered(self, name: str, block: int) -> str:
        """A block tensor's name in another block."""
        return re.sub(rf"^({self.block})\d+\.", lambda match: f"{match[1]}{block}.", name)

    def output_projection(self, kind: str) -> str:
        """Name after the block's number of the matrix that leads from heads or neurons to the residual stream."""
        return [name for name, pattern in self.sublayers[kind].items() if len(pattern.layout or ()) == 2][-1]

    def find_outer(self, name: str) -> Pattern | None:
        """What a tensor outside blocks is; None where the architecture does not know it."""
        return next((pattern for text, pattern in self.outer.items() if re.fullmatch(text, name)), None)

    def is_ignored(self, name: str) -> bool:
        """Whether a stored tensor is a buffer that loads without being there."""
        return any(re.fullmatch(text, name) for text in self.ignored)


def architecture(model_type: str) -> Architecture:
    """Architecture of a `model_type`; a heterogeneous one has its family's.

    Raises:
        StructureError: for an unknown one.
    """
    known = architectures()
    found = known.get(model_type.removeprefix(PREFIX))
    if found is None:
        hint = f"known are: {', '.join(sorted(known))}"
        raise StructureError(f"unknown architecture `{model_type}`", why="no file describes its tensors", hint=hint)
    return found


@cache
def architectures() -> dict[str, Architecture]:
    """All architectures by `model_type`."""
    import yaml

    found: dict[str, Architecture] = {}
    for file in sorted(_FOLDER.glob("*.yaml")):
        arch = _read(file.stem, yaml.safe_load(file.read_text(encoding="utf-8")))
        for model_type in arch.model_types:
            if model_type in found:
                raise StructureError(f"`{model_type}` is described twice", at=f"{found[model_type].name}, {arch.name}")
            found[model_type] = arch
    return found


_REQUIRED = {"model_types", "norm", "decoder", "keys", "lists", "stock_widths", "block", "attention", "ffn", "outer"}
_OPTIONAL = {"ignored": [], "head": "", "table": "", "projection": ""}


def _read(name: str, data: dict[str, Any]) -> Architecture:
    wrong = (_REQUIRED - set(data)) | (set(data) - _REQUIRED - set(_OPTIONAL))
    if wrong:
        raise StructureError(f"architecture `{name}`: missing or unknown keys", why=", ".join(sorted(wrong)))
    data = {**_OPTIONAL, **data}
    return Architecture(
        name=name,
        model_types=tuple(data["model_types"]),
        norm=data["norm"],
        decoder=data["decoder"],
        keys=data["keys"],
        lists=data["lists"],
        stock_widths=tuple(data["stock_widths"]),
        block=data["block"],
        sublayers={kind: _patterns(data[kind]) for kind in ("attention", "ffn")},
        outer=_patterns(data["outer"]),
        ignored=tuple(data["ignored"]),
        head=data["head"],
        table=data["table"],
        projection=data["projection"],
    )


def _patterns(data: Mapping[str, Any]) -> dict[str, Pattern]:
    found = {}
    for name, dims in data.items():
        layout = None if dims == "any" else tuple(tuple(dim.split()) for dim in dims)
        optional = name.endswith("?") and not name.endswith(")?")
        found[name.removesuffix("?") if optional else name] = Pattern(layout, optional)
    return found
