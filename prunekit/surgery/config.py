"""The configuration of a cut model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import SurgeryError
from prunekit.plan.cost import kept_hidden, kept_widths
from prunekit.plan.layer_fields import follow, refusal
from prunekit.plan.layout import Layout
from prunekit.plan.plan import Plan
from prunekit.structure.parts import HIDDEN, SubLayer
from prunekit.structure.shape import SKIPS
from prunekit.structure.view import ModelView

if TYPE_CHECKING:
    from prunekit.structure.architecture import Architecture

_CLASS_PREFIX = "Prunekit"


def cut_config(view: ModelView, plan: Plan, layout: Layout) -> dict[str, Any]:
    """`config.json` of the result.

    Args:
        plan: what goes.
        layout: format and blocks of the result.
    Raises:
        SurgeryError: if the format cannot say what is left, or the model computes something else once blocks move.
    """
    config = _heterogeneous(view, plan, layout) if layout.kind == "heterogeneous" else _stock(view, plan, layout)
    runtime = (config.get("prunekit") or {}).get("runtime") or {}
    if "made_for" in (runtime.get("attention") or {}):
        # The pattern was chosen for the model before the cut, and goes along.
        attention = {key: value for key, value in runtime["attention"].items() if key != "made_for"}
        config = config | {"prunekit": config["prunekit"] | {"runtime": runtime | {"attention": attention}}}
    return without_predictors(config)


def without_predictors(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that names no predictors of chosen units: those of another model would foretell nothing."""
    section = config.get("prunekit") or {}
    if "dynamic" not in section:
        return config
    others = {key: value for key, value in section.items() if key != "dynamic"}
    return {**{key: value for key, value in config.items() if key != "prunekit"},
            **({"prunekit": others} if others else {})}  # fmt: skip


def _stock(view: ModelView, plan: Plan, layout: Layout) -> dict[str, Any]:
    sources = _sources(layout)
    why = refusal(view, sources)
    if why:
        raise SurgeryError(
            f"the configuration of `{view.model_type}` cannot follow its blocks", why=why, at="config.json"
        )
    config = stock_base(view)
    changed, outside = follow(view, sources)
    changed |= _hidden(view, plan)
    for stack in view.arch.each:
        mine = [pair for pair in sources if view.stack_of(pair[0]) is stack]
        changed |= _depth(view, stack, len(mine))
        left = [
            getattr(view.blocks[block], kind) for pair in mine for kind, block in zip(stack.kinds, pair, strict=True)
        ]
        changed |= _heads(view, stack, _alike([s for s in left if s.role == "attention"], plan))
        changed |= _ffn(view, stack, [s for s in left if s.role == "ffn"], plan)
    config |= outside | _moved_pattern(view, sources)
    gone = {key for key, value in changed.items() if value is None}
    before = config[view.section] if view.section else config
    text = {key: value for key, value in (before | changed).items() if key not in gone}
    set_older_rope_keys(text)
    return config | {view.section: text} if view.section else text


def _sources(layout: Layout) -> list[tuple[int, ...]]:
    whole = [tuple(block for block in pair if block is not None) for pair in layout.pairs if None not in pair]
    if len(whole) != len(layout.pairs) or not whole:
        raise SurgeryError(f"a {layout.kind} model needs blocks with an attention and an FFN each")
    return whole


def stock_base(view: ModelView) -> dict[str, Any]:
    """The source's configuration without what only a heterogeneous folder has."""
    config = dict(view.config)
    if not view.heterogeneous:
        return config
    config.pop("auto_map", None)
    config["model_type"] = view.model_type
    config["architectures"] = _stock_classes(view)
    others = _other_sections(view)
    config.pop("prunekit", None)
    return config | ({"prunekit": others} if others else {})


def _stock_classes(view: ModelView) -> list[str]:
    return [name.removeprefix(_CLASS_PREFIX) for name in view.config.get("architectures") or ()]


def _other_sections(view: ModelView) -> dict[str, Any]:
    """What the `prunekit` section of the source holds besides its layers, such as a run-time pattern."""
    section = view.config.get("prunekit") or {}
    return {
        key: value for key, value in section.items() if key not in ("schema", "base_model_type", "per_layer_config")
    }


def _moved_pattern(view: ModelView, sources: list[tuple[int, ...]]) -> dict[str, Any]:
    """The `prunekit` section, where it has a run-time pattern for some blocks."""
    section = view.config.get("prunekit") or {}
    pattern = (section.get("runtime") or {}).get("attention") or {}
    if pattern.get("layers") is None:
        return {}
    moved = [new for new, pair in enumerate(sources) if pair[0] in pattern["layers"]]
    runtime = section["runtime"] | {"attention": pattern | {"layers": moved}}
    others = _other_sections(view) if view.heterogeneous else section
    return {"prunekit": others | {"runtime": runtime}}


def _depth(view: ModelView, stack: Architecture, blocks: int) -> dict[str, int]:
    """How many blocks a stack has left, under every name that the configuration has for it."""
    keys, text = stack.keys, view.text
    again = keys.get("blocks_too", "")
    return {keys["blocks"].split()[0]: blocks, **({again: blocks} if again in text else {})}


def _alike(sublayers: Iterable[SubLayer], plan: Plan) -> dict[str, int]:
    """Widths that all of them have left."""
    found = [kept_widths(sublayer, plan) for sublayer in sublayers]
    different = next((widths for widths in found if widths != found[0]), None)
    if different is not None:
        raise SurgeryError("a stock model needs blocks of one width", why=f"there are {found[0]} and {different}")
    return found[0]


def _hidden(view: ModelView, plan: Plan) -> dict[str, Any]:
    """A narrower residual stream, and the widths that a configuration would derive from it."""
    if HIDDEN not in plan.keep:
        return {}
    arch, text = view.arch, view.text
    changed = {arch.key("hidden", text): kept_hidden(view, plan)}
    if text.get(arch.key("ffn", text)) is None:
        changed[arch.key("ffn", text)] = view.widths["ffn"]["ffn"]
    if "head_width" in arch.keys:
        changed[arch.key("head_width", text)] = view.widths["attention"]["hd"]
    return changed


def _heads(view: ModelView, stack: Architecture, left: Mapping[str, int]) -> dict[str, Any]:
    keys, config = stack.keys, view.text
    heads = left["kv"] * left["rep"]
    old = config[keys["heads"]]
    if (heads, left["kv"]) == (old, config.get(keys.get("kv_heads", "")) or old):
        return {}
    if "kv_heads" not in keys or "head_width" not in keys:
        raise SurgeryError(
            f"a stock `{view.model_type}` cannot have {heads} heads of width {left['hd']}",
            why="its class divides the hidden width by the number of heads",
        )
    return {keys["heads"]: heads, keys["kv_heads"]: left["kv"], keys["head_width"]: left["hd"]}


def _ffn(view: ModelView, stack: Architecture, found: list[SubLayer], plan: Plan) -> dict[str, Any]:
    """Neurons and experts, where they are not the configuration's own."""
    changed = {}
    for axes in dict.fromkeys(tuple(sublayer.widths) for sublayer in found):
        alike = [sublayer for sublayer in found if tuple(sublayer.widths) == axes]
        usual = view.usual(alike[0])
        dense = usual is view.widths.get("dense_ffn") and "dense_ffn" in stack.keys
        for axis, size in _alike(alike, plan).items():
            if size != usual[axis]:
                changed[stack.key("dense_ffn" if dense else axis, view.text)] = size
    return changed


def set_older_rope_keys(config: dict[str, Any]) -> None:
    """Says the rotary embedding the way transformers 4 reads it too; it ignores `rope_parameters` without a word."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if isinstance(rope.get("full_attention"), dict) and isinstance(rope.get("sliding_attention"), dict):
        config.setdefault("rope_local_base_freq", rope["sliding_attention"].get("rope_theta"))
        rope = rope["full_attention"]
    if not isinstance(rope.get("rope_theta"), (int, float)):
        return
    if config.get("model_type") == "gpt_neox":
        config.setdefault("rotary_emb_base", rope["rope_theta"])
        config.setdefault("rotary_pct", rope.get("partial_rotary_factor", 1.0))
    else:
        config.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    if rope.get("rope_type", "default") != "default" and not config.get("rope_scaling"):
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}


def _heterogeneous(view: ModelView, plan: Plan, layout: Layout) -> dict[str, Any]:
    from prunekit.modeling.families import hetero_config_fields

    if any(source not in (None, block) for block, pair in enumerate(layout.pairs) for source in pair):
        raise SurgeryError("blocks of a heterogeneous model keep their numbers")
    layers: dict[str, dict[str, Any]] = {}
    digits = max(2, len(str(len(layout.pairs) - 1)))
    for block, pair in zip(view.blocks, layout.pairs, strict=True):
        stack = view.stack_of(block.index)
        gone = [SKIPS[kind] for kind, source in zip(stack.kinds, pair, strict=True) if source is None]
        layer: dict[str, Any] = {"skip": gone} if gone else {}
        for kind, source in zip(stack.kinds, pair, strict=True):
            sublayer = getattr(block, kind)
            if source is None or sublayer is None:
                continue
            layer |= _own_widths(view, stack, sublayer, plan)
        if layer:
            number = f"{block.index if block.number is None else block.number:0{digits}d}"
            layers[f"{stack.stack}.{number}" if stack.stack else number] = layer
    section: dict[str, Any] = {"schema": 1, "base_model_type": view.model_type, "per_layer_config": layers}
    if HIDDEN in plan.keep and "head_width" not in view.arch.keys:
        # Its class divides this by the number of heads.
        section["built_hidden_size"] = view.widths["attention"]["hd"] * view.text[view.arch.keys["heads"]]
        section["hidden_size"] = kept_hidden(view, plan)
    fields = hetero_config_fields(view.model_type, _stock_classes(view))
    return {**view.config, **_hidden(view, plan), **fields, "prunekit": {**_other_sections(view), **section}}


def _own_widths(view: ModelView, stack: Architecture, sublayer: SubLayer, plan: Plan) -> dict[str, Any]:
    """What a heterogeneous configuration says of a sub-layer's widths."""
    if sublayer.kind == "ffn":
        return _other_ffn(view, sublayer, plan)
    if sublayer.kind == "cross_attention":
        left = kept_widths(sublayer, plan)["kv"]
        return {"cross_attention_heads": left} if left != view.usual(sublayer)["kv"] else {}
    return _other_heads(view, stack, sublayer, plan) | _numbered_heads(view, sublayer, plan)


def _other_heads(view: ModelView, stack: Architecture, attention: SubLayer, plan: Plan) -> dict[str, int]:
    """Heads of a block that are not the configuration's own."""
    keys, left = stack.keys, kept_widths(attention, plan)
    heads = view.text[keys["heads"]]
    own = {"num_key_value_heads": left["kv"], "num_attention_heads": left["kv"] * left["rep"]}
    usual = {"num_key_value_heads": view.text.get(keys.get("kv_heads", "")) or heads, "num_attention_heads": heads}
    return {key: value for key, value in own.items() if value != usual[key]}


def _numbered_heads(view: ModelView, attention: SubLayer, plan: Plan) -> dict[str, list[int]]:
    """Which heads of the dense model a block has left, where blocks share a tensor with an entry for each."""
    if not view.arch.shared_heads:
        return {}
    there = view.heads_of(attention.block)
    kept = [there[i] for i in plan.keep.get(f"{attention.address}.kv_groups", range(len(there)))]
    return {"kept_heads": kept} if len(kept) < view.usual(attention)["kv"] else {}


def _other_ffn(view: ModelView, ffn: SubLayer, plan: Plan) -> dict[str, int]:
    """Neurons and experts of a block that are not the configuration's own."""
    names, usual = {"ffn": "intermediate_size", "experts": "num_local_experts"}, view.usual(ffn)
    return {names[axis]: size for axis, size in kept_widths(ffn, plan).items() if size != usual[axis]}
