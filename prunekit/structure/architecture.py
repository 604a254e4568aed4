"""Architectures as data: which tensors a block holds, and which axes their dimensions factor into."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from prunekit.core.errors import StructureError

SublayerKind = Literal["attention", "cross_attention", "ffn"]
PREFIX = "prunekit_"
_FOLDER = Path(__file__).with_name("archs")
# Kinds of sub-layer in the order in which a block runs them.
SUBLAYER_KINDS: tuple[SublayerKind, ...] = ("attention", "cross_attention", "ffn")
# For each dimension the axes it factors into, outermost first. "+" stands between sections that follow each other:
# queries, keys and values in one matrix are `("kv", "rep", "hd", "+", "kv", "hd", "+", "kv", "hd")`.
Layout = tuple[tuple[str, ...], ...]
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
Norm = Literal["pre", "post", "parallel"]


@dataclass(frozen=True)
class Pattern:
    """A tensor of an architecture.

    Args:
        layout: for each dimension the axes it factors into, outermost first, `...` at the end for any others; None
            where any shape will do.
        optional: whether a checkpoint may lack it.
    """

    layout: Layout | None
    optional: bool = False


@dataclass(frozen=True)
class Periodic:
    """A list with an entry a block that a configuration need not write out.

    Args:
        last: entry of every `period`-th block.
        others: entry of the others.
        period: how often, where the configuration does not say.
        key: of the configuration that says how often, "" for none.
    """

    last: Any
    others: Any
    period: int
    key: str = ""

    def entries(self, config: Mapping[str, Any], depth: int) -> list[Any]:
        """The list for so many blocks; a period of 2 gives `others, last, others, last`."""
        period = config.get(self.key) or self.period
        return [self.others if (i + 1) % period else self.last for i in range(depth)]


@dataclass(frozen=True)
class HiddenRule:
    """How the residual stream of an architecture can be made narrower.

    Args:
        model_types: for which that is known.
        norm: `rms`, whose root mean square would run over fewer channels, so that the stream is scaled to keep it; or
            `layer`, which normalises over the channels that stay.
        writes: tensors outside blocks that begin the stream, by pattern.
        last: the norm before the head, by pattern, "" where there is none.
    """

    model_types: tuple[str, ...]
    norm: Literal["rms", "layer"]
    writes: tuple[str, ...] = ()
    last: str = ""


@dataclass(frozen=True)
class Architecture:
    """One file of `archs/`; with `like` what it does not say is as in another.

    Args:
        name: of the file.
        model_types: `model_type` of the configurations it describes.
        norm: `pre` where each sub-layer adds its output to the residual stream, with norms inside the sub-layer; `post`
            where the sum is normalised; `parallel` where both sub-layers of a block read the same stream.
        norm_by: a configuration key, and the `norm` where it is true or missing and where it is false; or nothing.
        decoder: whether it keeps keys and values of earlier tokens.
        keys: names of the configuration's keys by role: blocks (and blocks_too, by which older files repeat their
            number), hidden, heads, kv_heads, head_width, ffn, or
            ffn_multiple where it gives the FFN's width as a multiple of the hidden width, and for experts: experts,
            active_experts, dense_ffn; embedding, where embeddings may be narrower than the hidden width. Several names,
            apart by a space, are tried in order.
        section: key of the configuration's part that describes the blocks, "" where the whole does; a configuration
            without that part does so itself.
        defaults: by model type of that part, what holds where it does not say.
        lists: configuration lists with an entry a block, and the sub-layer that an entry speaks of.
        periodic: by model type those of them that follow a rule where the configuration does not have them.
        sparse: keys of the blocks without experts: `dense` for their numbers, `step` for how often a block has experts.
        stock_widths: width kinds that a stock configuration can say when all blocks are alike.
        fixed: width kinds that cannot be cut, and why: what is left would compute something else.
        shared_heads: whether a tensor outside blocks has an entry for each head, so that heads keep their numbers.
        shared: pattern of tensors that belong to all blocks and are stored as if they were one block's, "" for none.
        deepest: the stack that none may be deeper than, "" for none: the stock class counts by its blocks the layers of
            its KV cache.
        first_attention_stays: whether the first attention differs from the others and cannot be another one.
        block: pattern of tensor names up to the block's number.
        sublayers: tensors of `attention`, `cross_attention` (that reads what an encoder gives; most have none), `ffn`
            and `dense_ffn` (that of blocks without experts in a model that has them) by the name after the block's
            number; `{expert}` stands for an expert's number, and the last matrix of each leads back to the residual
            stream.
        outer: tensors outside blocks by pattern.
        ignored: patterns of stored buffers that are no weights.
        head: pattern of the output matrix, "" where there is none.
        table: pattern of the token embedding, "" where there is none.
        projection: pattern of another matrix that every token passes outside blocks, "" where there is none.
        tied: model types whose head shares the token embedding where the configuration does not say.
        hidden: how hidden channels are cut, None where that is not known.
        stack: which of several stacks of blocks this describes, "" for a model with one, and for the whole of others.
        stacks: of the whole of a model with several: each of them, in the order they run. The whole then has no keys,
            block or sub-layers of its own.
    """

    name: str
    model_types: tuple[str, ...]
    norm: Norm
    norm_by: tuple[str, ...]
    decoder: bool
    keys: Mapping[str, str]
    section: str
    defaults: Mapping[str, Mapping[str, Any]]
    lists: Mapping[str, str]
    periodic: Mapping[str, Mapping[str, Periodic]]
    sparse: Mapping[str, str]
    stock_widths: tuple[str, ...]
    fixed: Mapping[str, str]
    shared_heads: bool
    shared: str
    deepest: str
    first_attention_stays: bool
    block: str
    sublayers: Mapping[str, Mapping[str, Pattern]]
    outer: Mapping[str, Pattern]
    ignored: tuple[str, ...]
    head: str
    table: str
    projection: str
    tied: tuple[str, ...]
    hidden: HiddenRule | None = None
    stack: str = ""
    stacks: tuple[Architecture, ...] = ()

    @property
    def each(self) -> tuple[Architecture, ...]:
        """Its stacks; itself where there is one."""
        return self.stacks or (self,)

    @property
    def kinds(self) -> tuple[SublayerKind, ...]:
        """Kinds of sub-layer that a block has, in the order they run."""
        return tuple(kind for kind in SUBLAYER_KINDS if self.sublayers[kind])

    def norm_of(self, config: Mapping[str, Any]) -> Norm:
        """How a configuration's sub-layers are normalised."""
        if not self.norm_by:
            return self.norm
        key, if_true, if_false = self.norm_by
        found: Norm = if_true if config.get(key, True) else if_false  # type: ignore[assignment]
        return found

    def key(self, role: str, config: Mapping[str, Any]) -> str:
        """The configuration's key for a role, "" where the architecture has none."""
        names = self.keys.get(role, "").split()
        return next((name for name in names if config.get(name) is not None), names[0] if names else "")

    def dense_blocks(self, config: Mapping[str, Any], depth: int) -> frozenset[int]:
        """Blocks of a model with experts that have none."""
        if not self.sparse:
            return frozenset()
        step = config.get(self.sparse["step"]) or 1
        named = config.get(self.sparse["dense"]) or ()
        return frozenset(i for i in range(depth) if i in named or (i + 1) % step)

    def split(self, name: str) -> tuple[int, str] | None:
        """Block number and rest of a tensor's name; None for a tensor outside blocks."""
        match = re.fullmatch(rf"{self.block}(\d+)\.(.+)", name)
        if match is None or (self.shared and re.fullmatch(self.shared, name)):
            return None
        return int(match[1]), match[2]

    def renumbered(self, name: str, block: int, expert: int | None = None) -> str:
        """A block tensor's name in another block, and for another expert where it belongs to one."""
        name = re.sub(rf"^({self.block})\d+\.", lambda match: f"{match[1]}{block}.", name)
        return name if expert is None else _EXPERT.sub(f".experts.{expert}.", name, count=1)

    @staticmethod
    def expert_of(name: str) -> tuple[str, int | None]:
        """A block tensor's name with `{expert}` for its expert's number, and the number, None where it has none."""
        found = _EXPERT.search(name)
        return (_EXPERT.sub(".experts.{expert}.", name, count=1), int(found[1])) if found else (name, None)

    def output_projection(self, kind: str) -> str:
        """Name after the block's number of the matrix that leads from heads or neurons to the residual stream."""
        return [name for name, pattern in self.sublayers[kind].items() if len(pattern.layout or ()) == 2][-1]

    def classes(self, config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
        """Names of a checkpoint's classes: the configuration's, or the base model's where an encoder's files hold that.

        Sentence encoders are often saved without the head that their configuration goes on to name. Tensors of a base
        model have names without its prefix, which is the optional part that a block's pattern begins with.
        """
        named = list(config.get("architectures") or ())
        bare = self.block.rpartition(")?")[2]
        if self.decoder or not any(re.match(bare, name) for name in names):
            return named
        return [re.sub(r"For[A-Z]\w*$", "Model", name) for name in named]

    def find_outer(self, name: str) -> Pattern | None:
        """What a tensor outside blocks is; None where the architecture does not know it."""
        return next((pattern for text, pattern in self.outer.items() if re.fullmatch(text, name)), None)

    def is_ignored(self, name: str) -> bool:
        """Whether a stored tensor is a buffer that loads without being there."""
        return any(re.fullmatch(text, name) for text in self.ignored)


def sections(dim: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The sections of a dimension, in order; most have one."""
    return tuple(tuple(part.split()) for part in " ".join(dim).split("+"))


def dim_size(dim: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    """Length of a dimension; `kv rep hd + kv hd` with kv 2, rep 2 and hd 8 gives 48. A number stands for itself."""
    return sum(math.prod(int(a) if a.isdecimal() else sizes[a] for a in part) for part in sections(dim))


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
    files = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(_FOLDER.glob("*.yaml"))}
    for name, data in files.items():
        arch = _read(name, {**files.get(data.pop("like", ""), {}), **data})
        for model_type in arch.model_types:
            if model_type in found:
                raise StructureError(f"`{model_type}` is described twice", at=f"{found[model_type].name}, {arch.name}")
            found[model_type] = arch
    return found


_REQUIRED = {"model_types", "norm", "decoder", "keys", "lists", "stock_widths", "block", "attention", "ffn", "outer"}
_OPTIONAL: dict[str, Any] = {
    "norm_by": [],
    "section": "",
    "defaults": {},
    "periodic": {},
    "sparse": {},
    "fixed": {},
    "dense_ffn": {},
    "ignored": [],
    "head": "",
    "table": "",
    "projection": "",
    "tied": [],
    "shared_heads": False,
    "shared": "",
    "deepest": "",
    "cross_attention": {},
    "stacks": {},
    "first_attention_stays": False,
    "hidden": None,
}


# What describes the blocks of one stack, and the whole of a model with several does not have.
_OF_BLOCKS: dict[str, Any] = {"keys": {}, "block": "", "attention": {}, "ffn": {}}


def _read(name: str, data: dict[str, Any]) -> Architecture:
    stacks = data.get("stacks", {})
    found = _described(name, {**(_OF_BLOCKS if stacks else {}), **data})
    parts = (replace(_described(name, {**data, **part}), stack=stack) for stack, part in stacks.items())
    return replace(found, stacks=tuple(parts))


def _described(name: str, data: dict[str, Any]) -> Architecture:
    wrong = (_REQUIRED - set(data)) | (set(data) - _REQUIRED - set(_OPTIONAL))
    if wrong:
        raise StructureError(f"architecture `{name}`: missing or unknown keys", why=", ".join(sorted(wrong)))
    data = {**_OPTIONAL, **data}
    return Architecture(
        name=name,
        model_types=tuple(data["model_types"]),
        norm=data["norm"],
        norm_by=tuple(data["norm_by"]),
        decoder=data["decoder"],
        keys=data["keys"],
        section=data["section"],
        defaults=data["defaults"],
        lists=data["lists"],
        periodic={
            model_type: {key: Periodic(*rule) for key, rule in rules.items()}
            for model_type, rules in data["periodic"].items()
        },
        sparse=data["sparse"],
        stock_widths=tuple(data["stock_widths"]),
        fixed=data["fixed"],
        shared_heads=data["shared_heads"],
        shared=data["shared"],
        deepest=data["deepest"],
        first_attention_stays=data["first_attention_stays"],
        block=data["block"],
        sublayers={kind: _patterns(data[kind]) for kind in (*SUBLAYER_KINDS, "dense_ffn")},
        outer=_patterns(data["outer"]),
        ignored=tuple(data["ignored"]),
        head=data["head"],
        table=data["table"],
        projection=data["projection"],
        tied=tuple(data["tied"]),
        hidden=_hidden_rule(data["hidden"]),
    )


def _hidden_rule(data: Mapping[str, Any] | None) -> HiddenRule | None:
    if data is None:
        return None
    lists: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return HiddenRule(**lists)


def _patterns(data: Mapping[str, Any]) -> dict[str, Pattern]:
    found = {}
    for name, dims in data.items():
        layout = None if dims == "any" else tuple(tuple(dim.split()) for dim in dims)
        optional = name.endswith("?") and not name.endswith(")?")
        found[name.removesuffix("?") if optional else name] = Pattern(layout, optional)
    return found
