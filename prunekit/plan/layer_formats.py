"""Plans as one entry a block: DeciLM's `block_configs`, and `per_layer_config` of transformers and of our folders.

Both give counts: how many neurons a block has, not which of the source's. A file that prunekit writes has the positions
beside them, under a key that other readers pass over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import PlanError
from prunekit.plan.cost import kept_widths
from prunekit.plan.plan import Plan
from prunekit.structure.parts import HIDDEN
from prunekit.structure.shape import SKIPS

if TYPE_CHECKING:
    from prunekit.structure.parts import SubLayer
    from prunekit.structure.view import ModelView

POSITIONS = "prunekit_keep"
# All three implementations round an FFN's width up to a multiple of this.
FFN_MULTIPLE = 256
# Families whose blocks DeciLM's classes compute.
DECILM_FAMILIES = ("llama", "mistral")
_NO_CUTS = ("no_op", "replace_with_linear")
_WIDTH_KINDS = ("kv_groups", "query_heads", "neurons")


def block_configs(view: ModelView, plan: Plan) -> dict[str, Any]:
    """`block_configs` of a plan, with the positions of what narrowed FFNs keep.

    Raises:
        PlanError: for a family that DeciLM's classes do not compute, heads that go, or an FFN that is no multiple of
            256.
    """
    require_decilm(view)
    heads = next((f"`{a}`" for a in plan.keep if a.rpartition(".")[2] in ("kv_groups", "query_heads")), None)
    if HIDDEN in plan.keep:
        raise PlanError("it narrows the hidden width, and DeciLM's head size is that divided by the number of heads")
    if heads:
        raise PlanError(f"it narrows {heads}, and query heads are the same number in all `block_configs`")
    entries = []
    for number in range(len(view.blocks)):
        there = _there(view, plan, number)
        attention, ffn = there.get("attention"), there.get("ffn")
        group = None if attention is None else attention.widths["rep"]
        mult = None if ffn is None else _ffn_mult(view, kept_widths(ffn, plan)["ffn"], number)
        entries.append(
            {
                "attention": {"no_op": attention is None, "replace_with_linear": False, "n_heads_in_group": group},
                "ffn": {"no_op": ffn is None, "replace_with_linear": False, "ffn_mult": mult},
            }
        )
    return {"block_configs": entries, **_positions(plan)}


def read_block_configs(view: ModelView, data: Mapping[str, Any]) -> Plan:
    """The plan in a configuration with `block_configs`.

    Raises:
        PlanError: if an entry is no cut of the model, or says how many neurons stay and nothing says which.
    """
    entries = data["block_configs"]
    if len(entries) != len(view.blocks):
        raise PlanError(f"`block_configs` has {len(entries)} entries", why=f"the model has {len(view.blocks)} blocks")
    drop: list[str] = []
    counts: dict[str, int] = {}
    for number, entry in enumerate(entries):
        _only(entry, ("attention", "ffn", "parallel_blocks"), number)
        for kind, width in (("attention", _kv_heads), ("ffn", _neurons)):
            part, address = entry[kind], f"blocks.{number}.{kind}"
            if part.get("replace_with_linear"):
                raise PlanError(f"`replace_with_linear` of block {number} is no cut")
            if part.get("no_op"):
                drop.append(address)
            else:
                counts |= width(view, view.sublayer(address), part, number)
    return _plan(view, drop, counts, data)


def require_decilm(view: ModelView) -> None:
    """Makes sure that DeciLM's classes compute the blocks of a model.

    Raises:
        PlanError: naming what they do not know.
    """
    widths = {s.widths["kv"] * s.widths["rep"] * s.widths["hd"] for s in view.sublayers if s.kind == "attention"}
    if view.model_type not in DECILM_FAMILIES:
        raise PlanError(
            f"`{view.model_type}` computes other blocks than DeciLM's classes ({', '.join(DECILM_FAMILIES)})"
        )
    if view.config.get("sliding_window"):
        raise PlanError("DeciLM's classes know no sliding window")
    head = next(iter(view.config.get("architectures") or ()), "LlamaForCausalLM")
    if not head.endswith("ForCausalLM"):
        raise PlanError(f"DeciLM's classes end in a language model's head, `{head}` does not")
    if widths != {view.hidden}:
        raise PlanError("DeciLM's heads are as many in every block, and the hidden width divided by their number")


def _ffn_mult(view: ModelView, width: int, number: int) -> float:
    if width % FFN_MULTIPLE:
        raise PlanError(f"block {number} keeps {width} neurons, and readers round up to multiples of {FFN_MULTIPLE}")
    return 3 * width / (2 * view.hidden)


def decilm_width(ffn_mult: float, hidden: int) -> int:
    """FFN neurons that vLLM, TensorRT-LLM and llama.cpp's converter make of `ffn_mult`."""
    return -(-int(2 * ffn_mult * hidden / 3) // FFN_MULTIPLE) * FFN_MULTIPLE


def _kv_heads(view: ModelView, attention: SubLayer, part: Mapping[str, Any], number: int) -> dict[str, int]:
    _only(part, (*_NO_CUTS, "n_heads_in_group", "num_key_value_heads"), number)
    heads = attention.widths["kv"] * attention.widths["rep"]
    group, kv = part.get("n_heads_in_group"), part.get("num_key_value_heads")
    found = kv if group is None else heads // int(group)
    if found not in (None, attention.widths["kv"]):
        why = "a plan takes a KV head with its query heads, and query heads are the same number in all `block_configs`"
        raise PlanError(f"block {number} has {found} KV heads for {heads} query heads", why=why)
    return {}


def _neurons(view: ModelView, ffn: SubLayer, part: Mapping[str, Any], number: int) -> dict[str, int]:
    _only(part, (*_NO_CUTS, "ffn_mult", "intermediate_size"), number)
    mult, width = part.get("ffn_mult"), part.get("intermediate_size")
    found = width if mult is None else decilm_width(float(mult), view.hidden)
    return {} if found is None else {f"{ffn.address}.neurons": int(found)}


def _only(entry: Mapping[str, Any], known: tuple[str, ...], number: int) -> None:
    """What is said beyond cuts, unless it says nothing."""
    other = next((key for key, value in entry.items() if key not in known and value not in (None, False)), None)
    if other is not None:
        raise PlanError(f"`{other}` of block {number} is not what a plan can say", hint=f"known: {', '.join(known)}")


def per_layer_config(view: ModelView, plan: Plan) -> dict[str, Any]:
    """`per_layer_config` of a plan in the schema of transformers, with the positions of what stays.

    Raises:
        PlanError: for a width that the schema has no key for.
    """
    other = next((a for a in plan.keep if a.rpartition(".")[2] not in _WIDTH_KINDS), None)
    if other is not None:
        raise PlanError(f"it narrows `{other}`, and the format has no key for that")
    digits = max(2, len(str(len(view.blocks) - 1)))
    layers = {}
    for number, block in enumerate(view.blocks):
        there = _there(view, plan, number)
        layer: dict[str, Any] = {}
        gone = [SKIPS[s.kind] for s in block.sublayers if s.kind not in there]
        if gone:
            layer["skip"] = gone
        for sublayer in there.values():
            before, after = _sizes(sublayer, None), _sizes(sublayer, plan)
            layer |= {key: size for key, size in after.items() if size != before[key]}
        if layer:
            layers[f"{number:0{digits}d}"] = layer
    return {"per_layer_config": layers, **_positions(plan)}


def _sizes(sublayer: SubLayer, plan: Plan | None) -> dict[str, int]:
    widths = kept_widths(sublayer, plan)
    if sublayer.kind == "ffn":
        return {"intermediate_size": widths["ffn"]}
    return {"num_attention_heads": widths["kv"] * widths["rep"], "num_key_value_heads": widths["kv"]}


def read_per_layer_config(view: ModelView, data: Mapping[str, Any]) -> Plan:
    """The plan in a configuration with `per_layer_config`, at the top or in the section `prunekit`.

    Raises:
        PlanError: if an entry is no cut of the model, or says how many units stay and nothing says which.
    """
    layers = data["per_layer_config"] if "per_layer_config" in data else data["prunekit"]["per_layer_config"]
    drop: list[str] = []
    counts: dict[str, int] = {}
    kinds = {name: kind for kind, name in SKIPS.items()}
    for key, layer in layers.items():
        number = int(key)
        if not 0 <= number < len(view.blocks):
            raise PlanError(f"there is no block {number}", why=f"the model has blocks 0 to {len(view.blocks) - 1}")
        _only(layer, ("skip", "num_attention_heads", "num_key_value_heads", "intermediate_size"), number)
        gone = [f"blocks.{number}.{kinds[name]}" for name in layer.get("skip", ())]
        drop += gone
        for sublayer in view.blocks[number].sublayers:
            if sublayer.address not in gone:
                counts |= _counts(sublayer, {**_sizes(sublayer, None), **layer})
    return _plan(view, drop, counts, data)


def _counts(sublayer: SubLayer, sizes: Mapping[str, Any]) -> dict[str, int]:
    if sublayer.kind == "ffn":
        return {f"{sublayer.address}.neurons": int(sizes["intermediate_size"])}
    heads, kv = int(sizes["num_attention_heads"]), int(sizes["num_key_value_heads"])
    if kv < 1 or heads % kv:
        raise PlanError(f"the heads of `{sublayer.address}` do not divide", why=f"{heads} in {kv} KV groups")
    return {f"{sublayer.address}.kv_groups": kv, f"{sublayer.address}.query_heads": heads // kv}


def _there(view: ModelView, plan: Plan, number: int) -> dict[str, SubLayer]:
    return {s.kind: s for s in view.blocks[number].sublayers if s.address not in plan.drop}


def _positions(plan: Plan) -> dict[str, Any]:
    return {POSITIONS: {address: list(kept) for address, kept in plan.keep.items()}} if plan.keep else {}


def _plan(view: ModelView, drop: list[str], counts: Mapping[str, int], data: Mapping[str, Any]) -> Plan:
    """Cuts from counts, which need positions where they are lower than the model's."""
    positions: Mapping[str, list[int]] = data.get(POSITIONS) or {}
    widths = {f"{s.address}.{kind}": s.widths[axis] for s in view.sublayers for kind, axis in _axes(s)}
    lower = {address: count for address, count in counts.items() if count != widths[address]}
    for address, count in lower.items():
        if count > widths[address]:
            raise PlanError(f"`{address}` would be {count}", why=f"the model has {widths[address]}")
        if address not in positions:
            kind = address.rpartition(".")[2]
            raise PlanError(
                f"`{address}` keeps {count} of {widths[address]}, and the file does not say which",
                why="the format gives counts",
                hint=f"let a recipe choose: `remove: {kind}` with a score",
            )
    for address, kept in positions.items():
        if lower.get(address) != len(kept):
            raise PlanError(
                f"`{POSITIONS}` has {len(kept)} positions of `{address}`", why="the count beside it differs"
            )
    return Plan.make(view, drop, positions)


def _axes(sublayer: SubLayer) -> tuple[tuple[str, str], ...]:
    return (("neurons", "ffn"),) if sublayer.kind == "ffn" else (("kv_groups", "kv"), ("query_heads", "rep"))


def decilm_notes(view: ModelView, plan: Plan) -> dict[str, str]:
    """What readers of a plan's `block_configs` make of it; read in their sources in September 2026, not run."""
    parts = [_there(view, plan, number) for number in range(len(view.blocks))]
    alone = [number for number, part in enumerate(parts) if list(part) == ["attention"]]
    notes = {}
    first = "no: its class expects attention in block 0" if "attention" not in parts[0] and parts[0] else "yes"
    notes["vLLM"] = f"{first}; with --trust-remote-code (nemotron_nas.py in vllm@00bd149)"
    bias = view.config.get("attention_bias")
    notes["TensorRT-LLM"] = ("no: attention biases" if bias else "yes") + " (TensorRT-LLM, nemotron_nas)"
    if alone:
        lost = f"no: attention without an FFN is lost, in block {', '.join(map(str, alone))}"
    elif "ffn" not in parts[-1]:
        lost = "no: the last block needs an FFN"
    else:
        lost = "yes; tokenizers of Llama 2 and 3 only"
    notes["llama.cpp"] = f"{lost} (llama.cpp, deci)"
    return notes
