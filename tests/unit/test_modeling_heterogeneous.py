"""Heterogeneous classes compute what the stock class with the same parts masked computes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit.modeling import modeling_prunekit
from prunekit.modeling.modeling_prunekit import blocks_of
from tests.heterogeneous import heterogeneous, without
from tests.tiny import (
    BLOCKS,
    EXPERTS,
    FAMILIES,
    FFN,
    FIXED_HEADS,
    GROUPED,
    HEAD,
    HEADS,
    KV_HEADS,
    NEURONS,
    dinov2_linears,
    tiny_inputs,
    tiny_model,
)

TOLERANCE = 1e-12
BERTS = ("bert", "roberta", "xlm-roberta", "electra")
TOWERS = ("clip_vision_model", "clip_text_model", "siglip_vision_model", "siglip_text_model")
QKV = ("query", "key", "value")
BERT_ENDS = ("attention.output.dense", "output.dense")


def linears(name: str, qkv: Sequence[str], first: str, ends: tuple[str, str]) -> dict[str, tuple[str, int]]:
    """Layers of a block: what they are cut by, and the dimension of the weight."""
    entering = dict.fromkeys((name.format(part) for part in qkv), ("heads", 0))
    return {**entering, ends[0]: ("heads", 1), first: ("ffn", 0), ends[1]: ("ffn", 1)}


# Last layer of each sub-layer, inside a block: zeroing what it returns, or columns of it, masks a sub-layer or a unit.
ENDS = {
    **{family: {"attention": "self_attn.o_proj", "ffn": "mlp"} for family in EXPERTS},
    "gpt_neox": {"attention": "attention.dense", "ffn": "mlp.dense_4h_to_h"},
    "opt": {"attention": "self_attn.out_proj", "ffn": "fc2"},
    "gpt2": {"attention": "attn.c_proj", "ffn": "mlp.c_proj"},
    **{key: {"attention": "attention.output.dense", "ffn": "output.dense"} for key in BERTS},
    "mpnet": {"attention": "attention.attn.o", "ffn": "output.dense"},
    "distilbert": {"attention": "attention.out_lin", "ffn": "ffn.lin2"},
    "modernbert": {"attention": "attn.Wo", "ffn": "mlp.Wo"},
    **{key: {"attention": "attention.o_proj", "ffn": "mlp.fc2"} for key in ("vit", "deit")},
    "dinov2": {"attention": dinov2_linears()[3], "ffn": "mlp.fc2"},
    "videomae": {"attention": "attention.output.dense", "ffn": "output.dense"},
    **{key: {"attention": "self_attn.out_proj", "ffn": "mlp.fc2"} for key in TOWERS},
}
# Norms behind the residual sums of attention and FFN.
NORMS = {
    **dict.fromkeys(BERTS, ("attention.output.LayerNorm", "output.LayerNorm")),
    "mpnet": ("attention.LayerNorm", "output.LayerNorm"),
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
}
LLAMA_ENDS = {"attention": "self_attn.o_proj", "ffn": "mlp.down_proj"}
LLAMA_CUTS = {
    "self_attn.q_proj": ("heads", 0),
    "self_attn.k_proj": ("kv", 0),
    "self_attn.v_proj": ("kv", 0),
    "self_attn.o_proj": ("heads", 1),
    "mlp.gate_proj": ("ffn", 0),
    "mlp.up_proj": ("ffn", 0),
    "mlp.down_proj": ("ffn", 1),
}
CUTS = {
    "phi3": {
        "self_attn.qkv_proj": ("qkv", 0),
        "self_attn.o_proj": ("heads", 1),
        "mlp.gate_up_proj": ("gate_up", 0),
        "mlp.down_proj": ("ffn", 1),
    },
    "gpt_neox": {
        "attention.query_key_value": ("sides", 0),
        "attention.dense": ("heads", 1),
        "mlp.dense_h_to_4h": ("ffn", 0),
        "mlp.dense_4h_to_h": ("ffn", 1),
    },
    "opt": {
        **{f"self_attn.{name}_proj": ("heads", 0) for name in ("q", "k", "v")},
        "self_attn.out_proj": ("heads", 1),
        "fc1": ("ffn", 0),
        "fc2": ("ffn", 1),
    },
    "gpt2": {
        "attn.c_attn": ("parts", 1),
        "attn.c_proj": ("heads", 0),
        "mlp.c_fc": ("ffn", 1),
        "mlp.c_proj": ("ffn", 0),
    },
    **dict.fromkeys(BERTS, linears("attention.self.{}", QKV, "intermediate.dense", BERT_ENDS)),
    "mpnet": linears("attention.attn.{}", "qkv", "intermediate.dense", ("attention.attn.o", "output.dense")),
    "distilbert": linears("attention.{}_lin", "qkv", "ffn.lin1", ("attention.out_lin", "ffn.lin2")),
    "modernbert": {
        "attn.Wqkv": ("parts", 0),
        "attn.Wo": ("heads", 1),
        "mlp.Wi": ("gate_up", 0),
        "mlp.Wo": ("ffn", 1),
    },
    **dict.fromkeys(("vit", "deit"), linears("attention.{}_proj", "qkv", "mlp.fc1", ("attention.o_proj", "mlp.fc2"))),
    "dinov2": linears("{}", dinov2_linears()[:3], "mlp.fc1", (dinov2_linears()[3], "mlp.fc2")),
    "videomae": linears("attention.attention.{}", QKV, "intermediate.dense", BERT_ENDS),
    **dict.fromkeys(TOWERS, linears("self_attn.{}_proj", "qkv", "mlp.fc1", ("self_attn.out_proj", "mlp.fc2"))),
}


def mask(block: nn.Module, family: str, kind: str) -> None:
    """Makes a stock sub-layer add nothing; where a norm follows the sum, that is out too."""
    end = block.get_submodule(ENDS.get(family, LLAMA_ENDS)[kind])
    end.register_forward_hook(lambda _module, _args, out: torch.zeros_like(out))
    if family in NORMS:
        norm = block.get_submodule(NORMS[family][kind == "ffn"])
        norm.register_forward_hook(lambda _module, args, _out: args[0])


def same(family: str, a: Any, b: Any) -> bool:
    inputs = tiny_inputs(family)
    with torch.no_grad():
        return bool((a(**inputs)[0] - b(**inputs)[0]).abs().max() < TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "skips",
    [
        {0: ["attention"], 1: ["mlp"], 3: ["attention", "mlp"]},
        {0: ["mlp"], 2: ["attention"]},
        {i: ["attention"] for i in range(BLOCKS)},
    ],
    ids=["first-and-last", "middle", "all-attention"],
)
def test_skipped_sublayers_equal_masked_ones(family: str, skips: dict[int, list[str]]) -> None:
    stock = tiny_model(family)
    model = without(stock, *((i, name) for i, names in skips.items() for name in names))
    for i, names in skips.items():
        for name in names:
            mask(blocks_of(stock)[i], family, "ffn" if name == "mlp" else name)
    assert same(family, stock, model)
    assert model.num_parameters() < stock.num_parameters()


def rows(units: Sequence[int], width: int) -> list[int]:
    return [unit * width + i for unit in units for i in range(width)]


def cut(state: dict[str, Tensor], family: str, block: str, keep: dict[str, list[int]]) -> None:
    """Slices one block's tensors of a state dictionary; `keep` holds heads, KV heads and neurons."""
    hidden = HEADS * HEAD
    index = {"ffn": keep["ffn"], "heads": rows(keep["heads"], HEAD), "kv": rows(keep.get("kv", []), HEAD)}
    index["parts"] = [part * hidden + i for part in range(3) for i in index["heads"]]
    index["sides"] = rows(keep["heads"], 3 * HEAD)
    keys, values = ([start + i for i in index["kv"]] for start in (hidden, hidden + KV_HEADS * HEAD))
    index["qkv"] = [*index["heads"], *keys, *values]
    index["gate_up"] = [half * FFN + i for half in range(2) for i in keep["ffn"]]
    for path, (unit, dim) in CUTS.get(family, LLAMA_CUTS).items():
        kept = torch.tensor(index[unit])
        name = f"{block}.{path}.weight"
        state[name] = state[name].index_select(dim, kept)
        is_out = dim == (1 if family == "gpt2" else 0)
        if is_out and f"{block}.{path}.bias" in state:
            state[f"{block}.{path}.bias"] = state[f"{block}.{path}.bias"][kept]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*FIXED_HEADS, *EXPERTS)])
def test_narrower_blocks_equal_zeroed_units(family: str) -> None:
    stock = tiny_model(family)
    grouped = family in GROUPED
    width = NEURONS.get(family, FFN)
    neurons = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:40].sort().values.tolist()
    # Block 1 loses a KV group with its query heads. Block 2 loses a query head of each group, elsewhere one head.
    kept = {
        1: {"heads": [2, 3], "kv": [1], "ffn": neurons},
        2: {"heads": [0, 3] if grouped else [0, 2, 3], "kv": [0, 1], "ffn": list(range(width))},
    }
    layers: dict[str, Any] = {}
    for i, keep in kept.items():
        layers[f"{i:02d}"] = {"num_attention_heads": len(keep["heads"])}
        layers[f"{i:02d}"]["num_key_value_heads"] = len(keep["kv"] if grouped else keep["heads"])
        if family == "mpnet":
            layers[f"{i:02d}"]["kept_heads"] = keep["heads"]
    layers["01"]["intermediate_size"] = len(neurons)
    names = {module: name for name, module in stock.named_modules()}
    state = dict(stock.state_dict())
    for i, keep in kept.items():
        cut(state, family, names[blocks_of(stock)[i]], keep)
    model = heterogeneous(stock, layers, state)
    ends = ENDS.get(family, LLAMA_ENDS)
    for i, keep in kept.items():
        for kind, columns in (("attention", rows(keep["heads"], HEAD)), ("ffn", keep["ffn"])):
            weight = blocks_of(stock)[i].get_submodule(ends[kind]).weight.data
            weight = weight if family == "gpt2" else weight.T
            gone = torch.ones(len(weight), dtype=torch.bool)
            gone[columns] = False
            weight[gone] = 0
    assert same(family, stock, model)


@pytest.mark.parametrize("family", FIXED_HEADS)
def test_heads_under_one_norm_cannot_go(family: str) -> None:
    with pytest.raises(ValueError, match="they share a norm"):
        heterogeneous(tiny_model(family), {"01": {"num_attention_heads": 2, "num_key_value_heads": 1}})


def test_configuration_stays_shared_where_a_block_has_its_own_heads() -> None:
    model = heterogeneous(tiny_model("phi3"), {"01": {"num_attention_heads": 2, "num_key_value_heads": 1}})
    own = blocks_of(model)[1].self_attn.config
    assert (own.num_attention_heads, model.config.num_attention_heads) == (2, HEADS)
    model.set_attn_implementation("eager")
    assert own._attn_implementation == "eager"
    copied = copy.deepcopy(model)
    assert same("phi3", model, copied)
    assert blocks_of(copied)[1].self_attn.config.num_attention_heads == 2


def test_scores_scaled_by_block_number_keep_their_number() -> None:
    stock = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    model = without(stock, (0, "attention"))
    mask(blocks_of(stock)[0], "gpt2", "attention")
    assert same("gpt2", stock, model)


def test_fewer_kv_groups_alone_keep_the_query_heads() -> None:
    attention = blocks_of(heterogeneous(tiny_model("llama"), {"01": {"num_key_value_heads": 1}}))[1].self_attn
    assert attention.k_proj.weight.shape == (HEAD, 32)
    assert attention.q_proj.out_features == HEADS * HEAD
    assert attention.num_key_value_groups == HEADS


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"01": {"skip": ["ffn"]}}, "per_layer_config.01"),
        ({"01": {"head_dim": 4}}, "per_layer_config.01"),
        ({"04": {"skip": ["mlp"]}}, "no such block"),
        ({"01": {"num_key_value_heads": KV_HEADS, "num_attention_heads": 3}}, "3 heads on 2 KV heads"),
        ({"01": {"intermediate_size": FFN + 1}}, "49 neurons"),
        ({"01": {"num_local_experts": 2}}, "without experts"),
    ],
    ids=["skip", "key", "block", "heads", "neurons", "experts"],
)
def test_plan_that_is_not_understood_is_refused(layers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        heterogeneous(tiny_model("llama"), layers)


@pytest.mark.parametrize("count", [1, 5])
def test_experts_are_as_many_as_a_token_passes_and_there_are(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} experts of 48 neurons, the model has 4 of 48"):
        heterogeneous(tiny_model("mixtral"), {"01": {"num_local_experts": count}})


def test_experts_can_be_run_in_every_way_in_blocks_that_differ() -> None:
    layers = {"01": {"num_local_experts": 3}, "02": {"num_local_experts": 2, "intermediate_size": 16}}
    model = heterogeneous(tiny_model("mixtral"), layers).float()
    outputs = {}
    for way in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(way)
        assert model.config._experts_implementation == way
        with torch.no_grad():
            outputs[way] = model(**tiny_inputs("mixtral"))[0]
    assert (outputs["eager"] - outputs["grouped_mm"]).abs().max() < 1e-5
    assert (outputs["eager"] - outputs["batched_mm"]).abs().max() < 1e-5


def test_newer_schema_is_refused() -> None:
    config = modeling_prunekit.PrunekitLlamaConfig(
        **FAMILIES["llama"][2], prunekit={"schema": 2, "per_layer_config": {"00": {"skip": ["mlp"]}}}
    )
    with pytest.raises(ValueError, match="schema 2"):
        modeling_prunekit.PrunekitLlamaModel(config)
