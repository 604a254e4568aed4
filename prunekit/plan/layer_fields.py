"""What a configuration says of single blocks, and how it follows when blocks go or move."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunekit.structure.packed import SECTIONS

if TYPE_CHECKING:
    from prunekit.structure.view import ModelView

# For each block of the result the source blocks of its attention and its FFN, as in a layout.
Sources = Sequence[tuple[int, ...]]
# Lists of any configuration that have no entry a block, however long they are.
_OTHER_LISTS = {
    "architectures",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_decoder_ids",
}
# Blocks that need others, which no cut here looks after.
_TIES = {
    "num_kv_shared_layers": "the last attentions read keys and values of earlier ones",
    "num_nextn_predict_layers": "prediction heads after the last block read what it puts out",
}
# Keys that speak of single blocks in families that are known to read them.
_RULES = (
    "sliding_window_pattern",
    "no_rope_layer_interval",
    "mlp_only_layers",
    "hybrid_override_pattern",
    "full_attention_interval",
    "attn_layer_period",
    "expert_layer_period",
    "first_k_dense_replace",
    "moe_layer_freq",
    "interleave_moe_layer_step",
    "cross_attention_layers",
    "per_layer_config",
)
# What transformers takes where a configuration with `use_sliding_window` does not say it.
_MAX_WINDOW_LAYERS = 28
# Key that says every how many blocks attention has no window, and what transformers takes where it is missing.
_EVERY = {"modernbert": ("global_attn_every_n_layers", 3)}
# Signs of a name that stands for several: an expression, or a text with stars.
_PATTERN = re.compile(r"^\w*:|^[-+]:|[*?\[\](){}|+^$\\]")


def ties(view: ModelView) -> str:
    """Why no sub-layer of a model can go, "" where any can."""
    found = next((key for key in _TIES if view.text.get(key)), None)
    return "" if found is None else f"`{found}` is {view.text[found]}: {_TIES[found]}"


def refusal(view: ModelView, sources: Sources) -> str:
    """Why a stock configuration cannot follow its blocks to these places, "" where it can."""
    deep = cache_refusal(view, [view.blocks[pair[0]].stack for pair in sources])
    if deep:
        return deep
    if all(set(pair) == {i} for i, pair in enumerate(sources)) and len(sources) == len(view.blocks):
        return ""
    if view.text.get("scale_attn_by_inverse_layer_idx") and any(pair[0] != i for i, pair in enumerate(sources)):
        return "`scale_attn_by_inverse_layer_idx` ties a block's scale to its number"
    if view.arch.first_attention_stays and sources[0][0]:
        return "the stock class has no norm before its first attention, others have"
    return _stages(view) or _unknown_rule(view) or _unknown_list(view) or _unmovable_module(view, sources)


def follow(view: ModelView, sources: Sources) -> tuple[dict[str, Any], dict[str, Any]]:
    """What changes in a configuration so that it says of each block what it said of the source's.

    Returns:
        Changes to the section that describes the blocks, None for a key that goes, and changes to the whole.
    """
    text, lists = view.text, explicit_lists(view)
    changed: dict[str, Any] = {
        key: [lists[key][pair[0] if kind == "attention" else pair[-1]] for pair in sources]
        for key, kind in view.arch.lists.items()
        if key in lists
    }
    if view.model_type in _EVERY:
        changed[_EVERY[view.model_type][0]] = _every(changed["layer_types"])
    if "stage_names" in text and len(sources) != len(view.blocks):
        changed |= dict.fromkeys(("stage_names", "out_indices", "out_features"))
    full = text.get("max_window_layers")
    if isinstance(full, int):
        changed["max_window_layers"] = sum(pair[0] < full for pair in sources)
    for key, rule in view.arch.periodic.get(view.model_type, {}).items():
        if rule.key in text and changed.get(key) != rule.entries(text, len(sources)):
            changed[rule.key] = None
    if view.arch.sparse:
        dense = view.arch.dense_blocks(text, len(view.blocks))
        changed[view.arch.sparse["dense"]] = [new for new, pair in enumerate(sources) if pair[-1] in dense]
        changed[view.arch.sparse["step"]] = 1
    return changed, _quantised(view, sources)


def explicit_lists(view: ModelView) -> dict[str, list[Any]]:
    """The lists with an entry a block: those that are there, and those that the configuration gives by a rule."""
    text = view.text
    lists = {key: text[key] for key in view.arch.lists if isinstance(text.get(key), list)}
    periodic = view.arch.periodic.get(view.model_type, {})
    for key, rule in periodic.items():
        lists.setdefault(key, rule.entries(text, len(view.blocks)))
    if view.model_type in _EVERY and not lists.get("layer_types"):
        every = text.get(*_EVERY[view.model_type])
        kinds = ("full_attention", "sliding_attention")
        lists["layer_types"] = [kinds[i % every > 0] for i in range(len(view.blocks))]
    windowed = "layer_types" in view.arch.lists and text.get("use_sliding_window")
    if windowed and not periodic and not lists.get("layer_types"):
        first = text.get("max_window_layers", _MAX_WINDOW_LAYERS)
        names = ("full_attention", "sliding_attention")
        lists["layer_types"] = [names[block.index >= first] for block in view.blocks]
    return lists


def _every(types: list[str]) -> int:
    """Every how many blocks attention has no window, for transformers 4, which reads this number and not the list.

    0 where no number says it: transformers 4 then fails instead of computing something else.
    """
    windowed = [kind == "sliding_attention" for kind in types]
    numbers = range(1, len(types) + 1)
    return next((n for n in numbers if windowed == [i % n > 0 for i in range(len(types))]), 0)


def cache_refusal(view: ModelView, stacks: Sequence[str]) -> str:
    """Why a model cannot keep keys and values, "" where it can.

    Args:
        view: says by which stack's depth they are counted.
        stacks: that of each block.
    """
    most = view.arch.deepest
    deeper = (s.stack for s in view.arch.each if most and stacks.count(s.stack) > stacks.count(most))
    stack = next(deeper, None)
    return "" if stack is None else f"the class has no KV cache for a {stack} that is deeper than the {most}"


def _stages(view: ModelView) -> str:
    """A vision backbone names blocks that it hands out; the default, its last one, follows by itself."""
    given = view.text.get("out_indices")
    inner = "stage_names" in view.text and given not in (None, [len(view.blocks)])
    return f"`out_indices` {given} would name other blocks" if inner else ""


def _unknown_rule(view: ModelView) -> str:
    known = {rule.key for rule in view.arch.periodic.get(view.model_type, {}).values()}
    known |= set(view.arch.sparse.values())
    found = next((key for key in _RULES if view.text.get(key) and key not in known), None)
    if found is None:
        found = next((key for key in known if key in _RULES[:2] and isinstance(view.text.get(key), list | str)), None)
    return "" if found is None else f"nobody knows which blocks `{found}` of the configuration speaks of"


def _unknown_list(view: ModelView) -> str:
    depth = len(view.blocks)
    depths = {sum(block.stack == part.stack for block in view.blocks) for part in view.arch.each} - {0, 1}
    for section in (view.config, view.text):
        for key, value in section.items():
            deep = isinstance(value, list) and len(value) in depths and key not in _OTHER_LISTS
            if deep and key not in view.arch.lists and key not in view.arch.sparse.values():
                return f"the list `{key}` of the configuration is as long as the model is deep, and nobody knows why"
    for key in view.arch.lists:
        if isinstance(view.text.get(key), list) and len(view.text[key]) != depth:
            return f"the list `{key}` of the configuration has {len(view.text[key])} entries for {depth} blocks"
    return ""


def _unmovable_module(view: ModelView, sources: Sources) -> str:
    for section in SECTIONS:
        for name, free in _names(view.config.get(section)):
            place = _place(view, name)
            if place is None and _PATTERN.search(name) and re.search(r"(?<![A-Za-z0-9])\d", name):
                return f"`{name}` of `{section}` may name blocks, and is a pattern"
            if place and not free:
                return f"`{name}` of `{section}` names a block where no list does"
            if place and not place[1] and any(place[0] in pair and len(set(pair)) > 1 for pair in sources):
                return f"`{name}` of `{section}` names a block of which only a part moves"
    return ""


def _names(data: Any, free: bool = False) -> Iterator[tuple[str, bool]]:
    """Texts and keys of a quantisation's section, and whether they are of a list or a mapping, which can lose some."""
    if isinstance(data, str):
        yield data, free
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield key, True
            yield from _names(value)
    elif isinstance(data, list):
        for value in data:
            yield from _names(value, True)


def _quantised(view: ModelView, sources: Sources) -> dict[str, Any]:
    """What the configuration says of modules that are quantised in some way, or not, under their new names.

    Each method has keys of its own for that (`modules_to_not_convert`, `ignore`, `config_groups.*.targets`,
    `extra_config`), so that every name is followed wherever it stands.
    """
    there = {key: view.config[key] for key in SECTIONS if isinstance(view.config.get(key), Mapping)}
    moved = {key: _moved(view, section, sources) for key, section in there.items()}
    return {key: section for key, section in moved.items() if section != there[key]}


def _moved(view: ModelView, data: Any, sources: Sources) -> Any:
    """The same data with modules under their new names, those of blocks that went left out."""
    if isinstance(data, Mapping):
        return {
            new: _moved(view, value, sources) for key, value in data.items() for new in _renamed(view, key, sources)
        }
    if isinstance(data, list):
        new_names = [_renamed(view, v, sources) if isinstance(v, str) else [_moved(view, v, sources)] for v in data]
        return [value for values in new_names for value in values]
    return data


def _renamed(view: ModelView, name: str, sources: Sources) -> list[str]:
    """New names of a module: none where its block went, itself where it is in no block."""
    place = _place(view, name)
    if place is None:
        return [name]
    block, rest = place
    stack = view.stack_of(block)
    tables = {
        kind: [*stack.sublayers[kind], *(stack.sublayers["dense_ffn"] if kind == "ffn" else ())] for kind in stack.kinds
    }
    general, _ = stack.expert_of(f"{rest}.")
    holds = (any(f"{tensor}.".startswith(general) for tensor in tables[kind]) for kind in stack.kinds)
    column = next((i for i, found in enumerate(holds) if found), 0)
    mine = [pair for pair in sources if view.stack_of(pair[0]) is stack]
    moved = [new for new, pair in enumerate(mine) if pair[column] == block]
    return [re.sub(rf"^({stack.block})\d+", rf"\g<1>{new}", name) for new in moved]


def _place(view: ModelView, name: str) -> tuple[int, str] | None:
    """Block of a module, counted through the stacks, and the rest of its name; None outside the blocks there are."""
    for part in view.arch.each:
        found = re.fullmatch(rf"{part.block}(\d+)(?:\.(.+))?", name)
        there = [block.index for block in view.blocks if block.stack == part.stack]
        if found and int(found[1]) < len(there):
            return there[int(found[1])], found[2] or ""
    return None
