"""Configurations of cut models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from prunekit.core.errors import SurgeryError
from prunekit.plan.layout import Layout, choose_layout
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery.config import cut_config

BLOCK_1 = ("blocks.1.attention", "blocks.1.ffn")
STAGGERED = ("blocks.1.ffn", "blocks.2.attention")
Open = Callable[..., ModelView]


def cut(view: ModelView, drop: tuple[str, ...] = (), keep: dict[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    plan = Plan.make(view, drop, keep or {})
    return cut_config(view, plan, choose_layout(view, plan))


def in_all(kind: str, kept: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"blocks.{i}.{kind}": kept for i in range(4)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_fewer_blocks_change_their_number_only(opened: Open, family: str) -> None:
    view = opened(family)
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    ignored = {"rope_theta"}
    config = {k: v for k, v in cut(view, BLOCK_1).items() if k not in ignored}
    assert config == view.config | {key: 3}


def test_per_layer_lists_follow_their_sublayer(opened: Open) -> None:
    types = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    view = opened("qwen2")
    assert view.config["layer_types"] == types
    assert cut(view, BLOCK_1)["layer_types"] == [types[i] for i in (0, 2, 3)]
    assert cut(view, STAGGERED)["layer_types"] == [types[i] for i in (0, 1, 3)]
    assert cut(view, STAGGERED)["max_window_layers"] == 2


def test_layer_types_are_written_out_where_only_the_first_window_is_known(opened: Open, tmp_path: Path) -> None:
    view = opened("qwen2", without=("layer_types",))
    config = cut(view, BLOCK_1)
    assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert config["max_window_layers"] == 1


def test_no_window_needs_no_layer_types(opened: Open) -> None:
    view = opened("qwen2", {"use_sliding_window": False, "max_window_layers": 28}, without=("layer_types",))
    config = cut(view, BLOCK_1)
    assert "layer_types" not in config
    assert config["max_window_layers"] == 3


def test_head_width_is_written_out_when_heads_go(opened: Open) -> None:
    view = opened("llama", without=("head_dim",))
    assert "head_dim" not in cut(view, BLOCK_1)
    config = cut(view, (), in_all("attention.query_heads", (1,)))
    assert {key: config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")} == {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = cut(view, (), in_all("attention.kv_groups", (1,)))
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)


@pytest.mark.parametrize(("family", "key"), [("llama", "intermediate_size"), ("gpt2", "n_inner")])
def test_neurons_left_alike_in_all_blocks(opened: Open, family: str, key: str) -> None:
    assert cut(opened(family), (), in_all("ffn.neurons", (0, 5, 6)))[key] == 3


def test_rope_is_said_for_transformers_4_too(opened: Open) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    config = cut(opened("llama", {"rope_parameters": rope}), BLOCK_1)
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["rope_parameters"] == rope
    assert transformers.LlamaConfig(**config).rope_parameters == rope
    assert "rope_scaling" not in cut(opened("llama"), BLOCK_1)


def test_heterogeneous_section_says_what_differs(opened: Open) -> None:
    view = opened("llama")
    drop = ("blocks.0.attention", "blocks.3.attention", "blocks.3.ffn")
    keep = {
        "blocks.0.ffn.neurons": (1, 2),
        "blocks.1.attention.query_heads": (1,),
        "blocks.2.attention.kv_groups": (0,),
    }
    config = cut(view, drop, keep)
    assert config["prunekit"] == {
        "schema": 1,
        "base_model_type": "llama",
        "per_layer_config": {
            "00": {"skip": ["attention"], "intermediate_size": 2},
            "01": {"num_attention_heads": 2},
            "02": {"num_key_value_heads": 1, "num_attention_heads": 2},
            "03": {"skip": ["attention", "mlp"]},
        },
    }
    assert config["model_type"] == "prunekit_llama"
    assert config["architectures"] == ["PrunekitLlamaForCausalLM"]
    same = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    assert all(config[key] == view.config[key] for key in same)


def test_heads_of_gpt2_are_said_by_both_names(opened: Open) -> None:
    config = cut(opened("gpt2"), (), {"blocks.2.attention.kv_groups": (0, 1, 3)})
    assert config["prunekit"]["per_layer_config"] == {"02": {"num_key_value_heads": 3, "num_attention_heads": 3}}
    assert config["n_head"] == 4


def test_runtime_pattern_follows_its_blocks(opened: Open) -> None:
    runtime = {"runtime": {"attention": {"pattern": "power", "layers": [1, 2, 3]}}}
    view = opened("llama", {"prunekit": runtime})
    assert cut(view, BLOCK_1)["prunekit"] == {"runtime": {"attention": {"pattern": "power", "layers": [1, 2]}}}
    assert cut(view, BLOCK_1[:1])["prunekit"]["runtime"] == runtime["runtime"]


def test_gpt2_blocks_that_know_their_number_cannot_move(opened: Open) -> None:
    view = opened("gpt2", {"scale_attn_by_inverse_layer_idx": True})
    plan = Plan.make(view, BLOCK_1)
    with pytest.raises(SurgeryError, match="cannot follow") as caught:
        cut_config(view, plan, Layout("stock", ((0, 0), (2, 2), (3, 3))))
    assert "scale_attn_by_inverse_layer_idx" in caught.value.why
    last = Plan.make(view, ("blocks.3.attention", "blocks.3.ffn"))
    assert cut_config(view, last, Layout("stock", ((0, 0), (1, 1), (2, 2))))["n_layer"] == 3


@pytest.mark.parametrize(
    ("family", "keep", "pairs"),
    [
        ("llama", {"blocks.0.ffn.neurons": (1,)}, ((0, 0), (1, 1), (2, 2), (3, 3))),
        ("bert", in_all("attention.kv_groups", (1,)), ((0, 0), (1, 1), (2, 2), (3, 3))),
        ("llama", {}, ((0, 0), (1, 1), (2, 2), (3, None))),
    ],
    ids=["unequal", "heads-of-bert", "half-block"],
)
def test_stock_layout_that_cannot_say_it_is_refused(
    opened: Open, family: str, keep: dict[str, tuple[int, ...]], pairs: tuple[tuple[int | None, int | None], ...]
) -> None:
    view = opened(family)
    with pytest.raises(SurgeryError):
        cut_config(view, Plan.make(view, (), keep), Layout("stock", pairs))
