"""Plans written in the formats of other tools and read back, and what each format cannot say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunekit.core.errors import PlanError
from prunekit.plan.interchange import FORMATS, plan_text, read_plan
from prunekit.plan.layer_formats import decilm_notes, decilm_width
from prunekit.plan.plan import Plan
from prunekit.structure.parts import WIDTHS
from prunekit.structure.view import ModelView
from tests.tiny import write_tiny

DEPTH, WIDE = 5, 1024


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> ModelView:
    folder = tmp_path_factory.mktemp("llama")
    return ModelView.open(write_tiny("llama", folder, num_hidden_layers=DEPTH, intermediate_size=WIDE))


def random_plan(view: ModelView, draw: random.Random) -> Plan:
    """Whole blocks, with odds of single sub-layers, of narrower FFNs and of fewer heads."""
    sublayers, widths = draw.random() < 0.6, draw.random() < 0.5
    drop = [s.address for i in draw.sample(range(DEPTH), draw.randint(0, 3)) for s in view.blocks[i].sublayers]
    if sublayers:
        drop += [s.address for s in draw.sample(view.sublayers, 2)]
    keep = {}
    for kind, (owner, axis) in WIDTHS.items():
        for sublayer in view.sublayers:
            if widths and sublayer.kind == owner and axis in sublayer.widths and draw.random() < 0.3:
                width = sublayer.widths[axis]
                count = draw.choice([256, 512, 300]) if kind == "neurons" else draw.randint(1, width)
                if sublayer.address not in drop:
                    keep[f"{sublayer.address}.{kind}"] = sorted(draw.sample(range(width), count))
    return Plan.make(view, set(drop), keep)


def says(name: str, plan: Plan) -> bool:
    """Whether a format can say a plan, by what the format is."""
    blocks = all((f"blocks.{i}.attention" in plan.drop) == (f"blocks.{i}.ffn" in plan.drop) for i in range(DEPTH))
    if name in ("mergekit", "llama_quantize"):
        return blocks and not plan.keep and (name == "mergekit" or bool(plan.drop))
    if name == "llm_drop":
        return not plan.keep
    if name == "block_configs":
        return all(address.endswith("neurons") and len(kept) % 256 == 0 for address, kept in plan.keep.items())
    return True


@pytest.mark.parametrize("name", FORMATS)
def test_random_plans_come_back_as_they_were(view: ModelView, name: str, tmp_path: Path) -> None:
    said = {True: 0, False: 0}
    for seed in range(80):
        plan = random_plan(view, random.Random(seed))
        said[says(name, plan)] += 1
        if says(name, plan):
            (tmp_path / "plan").write_text(plan_text(view, plan, name, "some/model"))
            assert read_plan(tmp_path / "plan", view) == plan
        else:
            with pytest.raises(PlanError, match=f"`{name}` cannot say this plan") as caught:
                plan_text(view, plan, name, "some/model")
            assert caught.value.why
            assert "prunekit" in caught.value.hint
    assert said[True] > 5
    assert (said[False] > 5) == (name not in ("prunekit", "per_layer_config"))


def test_manifest_is_a_plan(view: ModelView, tmp_path: Path) -> None:
    plan = random_plan(view, random.Random(3))
    (tmp_path / "prunekit.json").write_text(json.dumps({"schema": 1, "plan": plan.to_json()}))
    assert read_plan(tmp_path / "prunekit.json", view) == plan


def written(view: ModelView, name: str, *drop: str, **keep: Any) -> str:
    return plan_text(
        view, Plan.make(view, drop, {key.replace("_", "."): kept for key, kept in keep.items()}), name, "m"
    )


def test_formats_say_what_the_tools_read(view: ModelView) -> None:
    """Each as its own tool writes it."""
    block = ("blocks.1.attention", "blocks.1.ffn")
    assert written(view, "llama_quantize", *block, "blocks.3.attention", "blocks.3.ffn") == "1,3\n"
    assert yaml.safe_load(written(view, "mergekit", *block)) == {
        "slices": [
            {"sources": [{"model": "m", "layer_range": [0, 1]}]},
            {"sources": [{"model": "m", "layer_range": [2, 5]}]},
        ],
        "merge_method": "passthrough",
    }
    drops = json.loads(written(view, "llm_drop", "blocks.2.attention", *block))
    assert drops == {"drop_attn_list": [1, 2], "drop_mlp_list": [1]}
    keep = {"blocks_0_ffn_neurons": range(256), "blocks_4_attention_query.heads": [1]}
    layers = json.loads(plan_text(view, Plan.make(view, ["blocks.2.ffn"], {
        "blocks.0.ffn.neurons": range(256), "blocks.4.attention.query_heads": [1]
    }), "per_layer_config", "m"))["per_layer_config"]  # fmt: skip
    assert layers == {"00": {"intermediate_size": 256}, "02": {"skip": ["mlp"]}, "04": {"num_attention_heads": 2}}
    del keep["blocks_4_attention_query.heads"]
    entries = json.loads(written(view, "block_configs", "blocks.1.attention", **keep))["block_configs"]
    assert entries[0]["ffn"] == {"no_op": False, "replace_with_linear": False, "ffn_mult": 12.0}
    assert entries[1]["attention"] == {"no_op": True, "replace_with_linear": False, "n_heads_in_group": None}
    assert entries[2]["attention"]["n_heads_in_group"] == 2


@pytest.mark.parametrize("hidden", [576, 2048, 4096, 5120, 8192])
def test_ffn_mult_comes_back_as_the_width(hidden: int) -> None:
    for width in range(256, 32_769, 256):
        assert decilm_width(3 * width / (2 * hidden), hidden) == width


def test_counts_without_positions_are_refused(view: ModelView, tmp_path: Path) -> None:
    for name in ("block_configs", "per_layer_config"):
        data = json.loads(written(view, name, blocks_0_ffn_neurons=range(256)))
        del data["prunekit_keep"]
        (tmp_path / "plan").write_text(json.dumps(data))
        with pytest.raises(PlanError, match="keeps 256 of 1024, and the file does not say which"):
            read_plan(tmp_path / "plan", view)


SLICE = "slices: [{{sources: [{{model: m, layer_range: [{}, {}]}}]}}]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SLICE.format(0, 9), "is not in the model"),
        (SLICE.format(3, 3), "is not in the model"),
        (SLICE.format(0, 2) + "merge_method: linear\n", "is no cut"),
        (SLICE.format(0, 2) + "parameters: {}\n", "`parameters` in the file"),
        ("slices:\n- sources: [{model: m, layer_range: [0, 3]}]\n- sources: [{model: m, layer_range: [2, 5]}]\n",
         "repeat or reorder"),
        ("slices:\n- sources: [{model: a, layer_range: [0, 3]}]\n- sources: [{model: b, layer_range: [3, 5]}]\n",
         "several models"),
        ("slices: [{sources: [{model: m, layer_range: [0, 1], parameters: {scale: 2}}]}]", "`parameters` in a source"),
        ("slices: 3", "is not a plan"),
        ("1,9", "there is no block 9"),
        ("1,1", "removed twice"),
        ("0,1,2,3,4", "leaves no sub-layer"),
        ('{"drop_attn_list": [true, false], "drop_mlp_list": []}', "has 2 entries"),
        ('{"drop_attn_list": [1], "num_hidden_layers": 32}', "for 32 blocks"),
        ('{"drop_attn_list": ["x"]}', "there is no block 'x'"),
        ('{"block_configs": []}', "has 0 entries"),
        ('{"per_layer_config": {"01": {"sliding_window": 6}}}', "`sliding_window` of block 1"),
        ('{"per_layer_config": {"01": {"intermediate_size": 2048}}}', "would be 2048"),
        ('{"per_layer_config": {"07": {}}}', "there is no block 7"),
        ('{"per_layer_config": {"01": {"num_key_value_heads": 3}}}', "do not divide"),
        ("\x00\x01", "is not a plan"),
        ("a: *b", "is not a plan"),
    ],
)  # fmt: skip
def test_what_is_no_cut_of_the_model_is_refused(view: ModelView, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "plan").write_text(text)
    with pytest.raises(PlanError) as caught:
        read_plan(tmp_path / "plan", view)
    assert words in caught.value.what
    assert str(tmp_path / "plan") in f"{caught.value.what} {caught.value.at}"


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("attention", {"replace_with_linear": True}, "`replace_with_linear` of block 1"),
        ("attention", {"n_heads_in_group": 4}, "1 KV heads for 4 query heads"),
        ("attention", {"window_length": 64}, "`window_length` of block 1"),
        ("ffn", {"ffn_mult": 96.0}, "would be 2048"),
    ],
)
def test_blocks_that_are_no_cut_are_refused(
    view: ModelView, part: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    data = json.loads(written(view, "block_configs"))
    data["block_configs"][1][part] |= change
    (tmp_path / "plan").write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        read_plan(tmp_path / "plan", view)
    assert words in f"{caught.value.what} {caught.value.why}"


def test_newer_keys_of_block_configs_are_read(view: ModelView, tmp_path: Path) -> None:
    """Counts by their own names, as Model-Optimizer writes them."""
    entry = {
        "attention": {"no_op": False, "num_key_value_heads": 2},
        "ffn": {"no_op": False, "intermediate_size": WIDE},
        "parallel_blocks": None,
    }
    gone = {"attention": {"no_op": True}, "ffn": {"no_op": False, "intermediate_size": WIDE}}
    (tmp_path / "plan").write_text(json.dumps({"block_configs": [gone, *[entry] * (DEPTH - 1)]}))
    assert read_plan(tmp_path / "plan", view).drop == ("blocks.0.attention",)


def test_booleans_of_llm_drop_are_flags(view: ModelView, tmp_path: Path) -> None:
    (tmp_path / "plan").write_text(json.dumps({"drop_mlp_list": [False, False, True, False, False]}))
    assert read_plan(tmp_path / "plan", view).drop == ("blocks.2.ffn",)


@pytest.mark.parametrize(("family", "why"), [("qwen3", "computes other blocks"), ("mistral", "sliding window")])
def test_block_configs_are_for_llamas(family: str, why: str, tmp_path: Path) -> None:
    other = ModelView.open(write_tiny(family, tmp_path / "m", intermediate_size=WIDE))
    with pytest.raises(PlanError, match="`block_configs` cannot say") as caught:
        written(other, "block_configs")
    assert why in caught.value.why


@pytest.mark.parametrize(
    ("drop", "refusing"),
    [
        ((), {"TensorRT-LLM"}),
        (("blocks.0.attention",), {"vLLM", "TensorRT-LLM"}),
        (("blocks.1.ffn",), {"TensorRT-LLM", "llama.cpp"}),
        (("blocks.4.attention", "blocks.4.ffn"), {"TensorRT-LLM", "llama.cpp"}),
    ],
)
def test_readers_of_block_configs_have_rules_of_their_own(
    view: ModelView, drop: tuple[str, ...], refusing: set[str]
) -> None:
    """The tiny model has attention biases, which TensorRT-LLM's class lacks."""
    notes = decilm_notes(view, Plan.make(view, drop))
    assert {runtime for runtime, note in notes.items() if note.startswith("no")} == refusing


def test_configuration_of_our_folders_is_a_plan(view: ModelView, tmp_path: Path) -> None:
    """The section of a heterogeneous folder's configuration is a plan of the dense model."""
    config = {"prunekit": {"per_layer_config": {"02": {"skip": ["attention", "mlp"]}}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_plan(tmp_path / "config.json", view).drop == ("blocks.2.attention", "blocks.2.ffn")
