"""The configuration of a cut model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prunekit.core.errors import SurgeryError
from prunekit.plan.cost import kept_widths
from prunekit.plan.layout import Layout
from prunekit.plan.plan import Plan
from prunekit.structure.view import SKIPS, SUBLAYER_KINDS, ModelView, SubLayer

_CLASS_PREFIX = "Prunekit"
# What transformers takes where a configuration with `use_sliding_window` does not say it.
_MAX_WINDOW_LAYERS = 28
# Key that says every how many blocks attention has no window, and what transformers takes where it is missing.
_EVERY = {"modernbert": ("global_attn_every_n_layers", 3)}


def cut_config(view: ModelView, plan: Plan, layout: Layout) -> dict[str, Any]:
    """`config.json` of the result.

    Args:
        plan: what goes.
        layout: format and blocks of the result.
    Raises:
        SurgeryError: if the format cannot say what is left, or the model computes something else once blocks move.
    """
    if layout.kind == "heterogeneous":
        return _heterogeneous(view, plan, layout)
    return _stock(view, plan, layout)


def _stock(view: ModelView, plan: Plan, layout: Layout) -> dict[str, Any]:
    sources = _sources(layout)
    _require_movable(view.config, sources)
    config = _stock_base(view)
    _drop_stages(config, len(view.blocks), len(sources))
    config |= _per_layer_lists(view, sources)
    config[view.arch.keys["blocks"]] = len(sources)
    attention = [view.blocks[a].attention for a, _ in sources]
    ffn = [view.blocks[f].ffn for _, f in sources]
    config |= _heads(view, _alike(attention, plan))
    config |= _neurons(view, _alike(ffn, plan))
    _set_older_rope_keys(config)
    return config


def _sources(layout: Layout) -> list[tuple[int, int]]:
    whole = [(a, f) for a, f in layout.pairs if a is not None and f is not None]
    if len(whole) != len(layout.pairs) or not whole:
        raise SurgeryError(f"a {layout.kind} model needs blocks with an attention and an FFN each")
    return whole


def _require_movable(config: Mapping[str, Any], sources: list[tuple[int, int]]) -> None:
    """GPT-2 may divide attention scores by the block's number, which is then part of what a block computes."""
    moved = next((a for new, (a, _) in enumerate(sources) if a != new), None)
    if config.get("scale_attn_by_inverse_layer_idx") and moved is not None:
        raise SurgeryError(
            f"the attention of block {moved} cannot move to another block",
            why="`scale_attn_by_inverse_layer_idx` makes what a block computes depend on its number",
            hint="remove blocks from the end only, or a part of a block, which keeps the numbers",
            at="config.json",
        )


def _drop_stages(config: dict[str, Any], old: int, new: int) -> None:
    """Takes out the names of the blocks that a vision backbone can hand out; its configuration makes them anew."""
    given = config.get("out_indices")
    if new == old or "stage_names" not in config:
        return
    if given not in (None, [old]):
        raise SurgeryError(
            "blocks of a backbone that hands out inner blocks cannot go",
            why=f"`out_indices` {given} would name others",
            hint="remove parts of blocks with `layout: heterogeneous`, which keeps the numbers",
            at="config.json",
        )
    for key in ("stage_names", "out_indices", "out_features"):
        config.pop(key, None)


def _stock_base(view: ModelView) -> dict[str, Any]:
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


def _per_layer_lists(view: ModelView, sources: list[tuple[int, int]]) -> dict[str, Any]:
    """Lists and numbers that speak of single blocks, for the blocks of the result."""
    config = view.config | _explicit_layer_types(view) | _numbered_layer_types(view)
    changed: dict[str, Any] = {}
    for key, kind in view.arch.lists.items():
        if isinstance(config.get(key), list):
            changed[key] = [config[key][a if kind == "attention" else f] for a, f in sources]
    if view.model_type in _EVERY and "layer_types" in changed:
        changed[_EVERY[view.model_type][0]] = _every(changed["layer_types"])
    full = config.get("max_window_layers")
    if isinstance(full, int):
        changed["max_window_layers"] = sum(a < full for a, _ in sources)
    section = config.get("prunekit") or {}
    pattern = (section.get("runtime") or {}).get("attention") or {}
    if pattern.get("layers") is not None:
        moved = [new for new, (a, _) in enumerate(sources) if a in pattern["layers"]]
        runtime = section["runtime"] | {"attention": pattern | {"layers": moved}}
        others = _other_sections(view) if view.heterogeneous else section
        changed["prunekit"] = others | {"runtime": runtime}
    return changed


def _explicit_layer_types(view: ModelView) -> dict[str, list[str]]:
    """Window or not for each block, where a configuration gives the first windowed block only."""
    config = view.config
    if "layer_types" not in view.arch.lists or config.get("layer_types") or not config.get("use_sliding_window"):
        return {}
    first = config.get("max_window_layers", _MAX_WINDOW_LAYERS)
    names = ("full_attention", "sliding_attention")
    return {"layer_types": [names[block.index >= first] for block in view.blocks]}


def _numbered_layer_types(view: ModelView) -> dict[str, list[str]]:
    """Window or not for each block, where a configuration says every how many blocks there is none."""
    if view.model_type not in _EVERY or view.config.get("layer_types"):
        return {}
    every = view.config.get(*_EVERY[view.model_type])
    return {"layer_types": ["sliding_attention" if i % every else "full_attention" for i in range(len(view.blocks))]}


def _every(types: list[str]) -> int:
    """Every how many blocks attention has no window, for transformers 4, which reads this number and not the list.

    0 where no number says it: transformers 4 then fails instead of computing something else.
    """
    windowed = [kind == "sliding_attention" for kind in types]
    numbers = range(1, len(types) + 1)
    return next((n for n in numbers if windowed == [i % n > 0 for i in range(len(types))]), 0)


def _alike(sublayers: Iterable[SubLayer | None], plan: Plan) -> dict[str, int]:
    """Widths that all of them have left."""
    found = [kept_widths(sublayer, plan) for sublayer in sublayers if sublayer is not None]
    different = next((widths for widths in found if widths != found[0]), None)
    if different is not None:
        raise SurgeryError("a stock model needs blocks of one width", why=f"there are {found[0]} and {different}")
    return found[0]


def _heads(view: ModelView, left: Mapping[str, int]) -> dict[str, Any]:
    keys, config = view.arch.keys, view.config
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


def _neurons(view: ModelView, left: Mapping[str, int]) -> dict[str, Any]:
    return {} if left["ffn"] == view.widths["ffn"] else {view.arch.keys["ffn"]: left["ffn"]}


def _set_older_rope_keys(config: dict[str, Any]) -> None:
    """Says the rotary embedding the way transformers 4 reads it too; it ignores `rope_parameters` without a word."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), (int, float)):
        return
    config.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default" and not config.get("rope_scaling"):
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}


def _heterogeneous(view: ModelView, plan: Plan, layout: Layout) -> dict[str, Any]:
    from prunekit.modeling.families import hetero_config_fields

    if any(source not in (None, block) for block, pair in enumerate(layout.pairs) for source in pair):
        raise SurgeryError("blocks of a heterogeneous model keep their numbers")
    layers: dict[str, dict[str, Any]] = {}
    digits = max(2, len(str(len(layout.pairs) - 1)))
    for block, (attention, ffn) in enumerate(layout.pairs):
        gone = [SKIPS[kind] for kind, source in zip(SUBLAYER_KINDS, (attention, ffn), strict=True) if source is None]
        layer: dict[str, Any] = {"skip": gone} if gone else {}
        if attention is not None:
            layer |= _other_heads(view, view.blocks[block].attention, plan)
            layer |= _numbered_heads(view, view.blocks[block].attention, plan)
        if ffn is not None:
            layer |= _other_neurons(view, view.blocks[block].ffn, plan)
        if layer:
            layers[f"{block:0{digits}d}"] = layer
    section = {"schema": 1, "base_model_type": view.model_type, "per_layer_config": layers}
    fields = hetero_config_fields(view.model_type, _stock_classes(view))
    return {**view.config, **fields, "prunekit": {**section, **_other_sections(view)}}


def _other_heads(view: ModelView, attention: SubLayer | None, plan: Plan) -> dict[str, int]:
    """Heads of a block that are not the configuration's own."""
    if attention is None:
        return {}
    keys, left = view.arch.keys, kept_widths(attention, plan)
    heads = view.config[keys["heads"]]
    own = {"num_key_value_heads": left["kv"], "num_attention_heads": left["kv"] * left["rep"]}
    usual = {"num_key_value_heads": view.config.get(keys.get("kv_heads", "")) or heads, "num_attention_heads": heads}
    return {key: value for key, value in own.items() if value != usual[key]}


def _numbered_heads(view: ModelView, attention: SubLayer | None, plan: Plan) -> dict[str, list[int]]:
    """Which heads of the dense model a block has left, where blocks share a tensor with an entry for each."""
    if attention is None or not view.arch.shared_heads:
        return {}
    there = view.heads_of(attention.block)
    kept = [there[i] for i in plan.keep.get(f"{attention.address}.kv_groups", range(len(there)))]
    return {"kept_heads": kept} if len(kept) < view.widths["kv"] else {}


def _other_neurons(view: ModelView, ffn: SubLayer | None, plan: Plan) -> dict[str, int]:
    if ffn is None:
        return {}
    left = kept_widths(ffn, plan)["ffn"]
    return {} if left == view.widths["ffn"] else {"intermediate_size": left}
