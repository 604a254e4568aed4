"""What configurations say of single blocks, after blocks have gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from prunekit.core.errors import PlanError
from prunekit.plan.layout import choose_layout
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery.config import cut_config
from tests.tiny import FAMILIES

BLOCK_0 = ("blocks.0.attention", "blocks.0.ffn")
STAGGERED = ("blocks.1.ffn", "blocks.2.attention")
F, S = "full_attention", "sliding_attention"
Open = Callable[..., ModelView]


def cut(view: ModelView, drop: tuple[str, ...]) -> dict[str, Any]:
    plan = Plan.make(view, drop)
    return cut_config(view, plan, choose_layout(view, plan, "stock"))


def read(family: str, config: dict[str, Any]) -> Any:
    """The configuration as transformers understands it."""
    return getattr(transformers, FAMILIES[family][0])(**config)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize(("drop", "left"), [(BLOCK_0, (1, 2, 3)), (STAGGERED, (0, 1, 3))], ids=["block", "repacked"])
def test_windows_that_alternate_by_rule_are_written_out(
    opened: Open, family: str, drop: tuple[str, ...], left: tuple[int, ...]
) -> None:
    view = opened(family, {"sliding_window_pattern": 2} if family == "gemma3_text" else {}, ("layer_types",))
    types = read(family, view.config).layer_types
    assert types == [S, F, S, F]
    config = cut(view, drop)
    assert config["layer_types"] == [types[i] for i in left]
    assert read(family, config).layer_types == config["layer_types"]
    assert "sliding_window_pattern" not in config


def test_period_stays_where_it_stays_true(opened: Open) -> None:
    view = opened("gemma3_text", {"sliding_window_pattern": 2}, ("layer_types",))
    config = cut(view, ("blocks.3.attention", "blocks.3.ffn"))
    assert (config["layer_types"], config["sliding_window_pattern"]) == ([S, F, S], 2)


@pytest.mark.parametrize("without", [(), ("no_rope_layers",), ("no_rope_layers", "layer_types")])
@pytest.mark.parametrize(("drop", "left"), [(BLOCK_0, (1, 2, 3)), (STAGGERED, (0, 1, 3))], ids=["block", "repacked"])
def test_attention_without_rotary_positions_stays_without(
    opened: Open, without: tuple[str, ...], drop: tuple[str, ...], left: tuple[int, ...]
) -> None:
    view = opened("smollm3", without=without)
    before, after = read("smollm3", view.config), read("smollm3", cut(view, drop))
    assert before.no_rope_layers == [1, 0, 1, 0]
    assert after.no_rope_layers == [before.no_rope_layers[i] for i in left]
    assert after.layer_types == [before.layer_types[i] for i in left]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strange": [1, 2, 3, 4]}, "`strange` of the configuration is as long as the model is deep"),
        ({"sliding_window_pattern": [S, F]}, "`sliding_window_pattern`"),
        ({"sliding_window_pattern": "LG"}, "`sliding_window_pattern`"),
        ({"mlp_only_layers": [1]}, "`mlp_only_layers`"),
        ({"no_rope_layer_interval": 3}, "`no_rope_layer_interval`"),
        ({"hybrid_override_pattern": "M*M-"}, "`hybrid_override_pattern`"),
        ({"layers_block_type": ["mamba", "attention"] * 2}, "`layers_block_type`"),
        ({"attn_layer_period": 2}, "`attn_layer_period`"),
        ({"first_k_dense_replace": 1}, "`first_k_dense_replace`"),
        ({"per_layer_config": {"01": {"intermediate_size": 8}}}, "`per_layer_config`"),
        ({"layer_types": [F]}, "has 1 entries for 4 blocks"),
    ],
)
def test_what_nobody_understands_is_refused_by_name(opened: Open, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        cut(opened("llama", changes), BLOCK_0)
    assert words in caught.value.why


def test_pattern_that_is_no_number_is_refused_where_numbers_are_known(opened: Open) -> None:
    with pytest.raises(PlanError) as caught:
        cut(opened("gemma3_text", {"sliding_window_pattern": [S, F]}), BLOCK_0)
    assert "`sliding_window_pattern`" in caught.value.why


def test_lists_of_other_things_may_be_as_long_as_the_model_is_deep(opened: Open) -> None:
    assert cut(opened("llama", {"eos_token_id": [1, 2, 3, 4]}), BLOCK_0)["eos_token_id"] == [1, 2, 3, 4]


@pytest.mark.parametrize("key", ["num_kv_shared_layers", "num_nextn_predict_layers"])
def test_blocks_that_need_others_stay(opened: Open, key: str) -> None:
    view = opened("llama", {key: 2})
    with pytest.raises(PlanError, match="no sub-layer") as caught:
        choose_layout(view, Plan.make(view, ("blocks.1.ffn",)))
    assert f"`{key}` is 2" in caught.value.why
    assert choose_layout(view, Plan.make(view, (), {"blocks.1.ffn.neurons": (1, 2)})).kind == "heterogeneous"
    assert choose_layout(opened("llama", {key: 0}), Plan.make(view, BLOCK_0)).kind == "stock"


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignore", "llm_int8_skip_modules"])
def test_modules_that_are_not_quantised_follow_their_blocks(opened: Open, key: str) -> None:
    names = ["lm_head", "model.layers.0.mlp", "model.layers.1.mlp.up_proj", "model.layers.2.self_attn", "re:.*gate.*"]
    view = opened("llama", {"quantization_config": {"quant_method": "any", key: names}})
    section = cut(view, BLOCK_0)["quantization_config"]
    kept = ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn", "re:.*gate.*"]
    assert section == {"quant_method": "any", key: kept}
    section = cut(view, STAGGERED)["quantization_config"]
    assert section[key] == ["lm_head", "model.layers.0.mlp", "re:.*gate.*"]


def test_modules_are_followed_wherever_a_quantisation_names_them(opened: Open) -> None:
    section = {
        "config_groups": {"group_0": {"targets": ["model.layers.0.mlp", "model.layers.3.mlp", "re:.*self_attn.*"]}},
        "extra_config": {"model.layers.0.mlp": {"bits": 8}, "model.layers.2.self_attn": {"bits": 8}},
    }
    view = opened("llama", {"quantization_config": section})
    assert cut(view, BLOCK_0)["quantization_config"] == {
        "config_groups": {"group_0": {"targets": ["model.layers.2.mlp", "re:.*self_attn.*"]}},
        "extra_config": {"model.layers.1.self_attn": {"bits": 8}},
    }
    older = opened("llama", {"compression_config": {"ignore": ["model.layers.3.mlp"]}})
    assert cut(older, BLOCK_0)["compression_config"] == {"ignore": ["model.layers.2.mlp"]}


def test_single_name_of_a_block_is_refused(opened: Open) -> None:
    with pytest.raises(PlanError) as caught:
        cut(opened("llama", {"quantization_config": {"first": "model.layers.0.mlp"}}), BLOCK_0)
    assert "names a block where no list does" in caught.value.why


@pytest.mark.parametrize(
    ("name", "drop"),
    [
        ("re:.*layers.3.*", BLOCK_0),
        ("*layers.3*", BLOCK_0),
        ("-:model.layers.3.mlp", BLOCK_0),
        (r"model\.layers\.[0-3]\.mlp", BLOCK_0),
        ("model.layers.1", STAGGERED),
    ],
    ids=["expression", "stars", "gptqmodel", "range", "half-a-block"],
)
def test_modules_that_cannot_be_renamed_are_refused(opened: Open, name: str, drop: tuple[str, ...]) -> None:
    view = opened("llama", {"quantization_config": {"ignore": [name]}})
    with pytest.raises(PlanError) as caught:
        cut(view, drop)
    assert f"`{name}`" in caught.value.why


def test_whole_blocks_that_are_not_quantised_are_renamed(opened: Open) -> None:
    view = opened("llama", {"quantization_config": {"ignore": ["model.layers.0", "model.layers.3"]}})
    assert cut(view, BLOCK_0)["quantization_config"]["ignore"] == ["model.layers.2"]


def test_modules_of_experts_follow_the_ffn(opened: Open) -> None:
    parts = ("block_sparse_moe.experts.1", "block_sparse_moe.experts.0.w1", "self_attn.q_proj")
    names = [f"model.layers.{block}.{part}" for block in (1, 2) for part in parts]
    section = cut(opened("mixtral", {"quantization_config": {"ignore": names}}), STAGGERED)["quantization_config"]
    assert section["ignore"] == [f"model.layers.1.{parts[2]}", *(f"model.layers.1.{part}" for part in parts[:2])]


def test_modules_of_blocks_that_are_not_there_stay(opened: Open) -> None:
    names = ["model.layers.3.mlp", "model.layers.4", "model.layers.61.mlp"]
    view = opened("llama", {"quantization_config": {"ignore": names}})
    for drop in (BLOCK_0, STAGGERED):
        section = cut(view, drop)["quantization_config"]
        assert section["ignore"] == ["model.layers.2.mlp", *names[1:]]


def test_rotary_positions_of_neox_and_gemma_are_said_for_transformers_4_too(opened: Open, tmp_path: Path) -> None:
    config = cut(opened("gpt_neox"), BLOCK_0)
    assert (config["rotary_emb_base"], config["rotary_pct"]) == (10000, 0.5)
    assert read("gpt_neox", config).rope_parameters["partial_rotary_factor"] == 0.5
    config = cut(opened("gemma3_text"), BLOCK_0)
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)


def test_factors_of_long_positions_keep_the_heads(opened: Open) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    view = opened("phi3", {"rope_parameters": rope})
    keep = {f"blocks.{i}.attention.query_heads": (1,) for i in range(4)}
    assert choose_layout(view, Plan.make(view, (), keep)).kind == "heterogeneous"
    assert "factors of rotary positions" in choose_layout(view, Plan.make(view, (), keep)).reason
