"""DeciLM folders: what `block_configs` says, and that the folder computes the same in a process without prunekit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from prunekit.core.errors import PlanError
from prunekit.export.decilm import export_decilm
from prunekit.export.verify import verify
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.tiny import write_tiny


def cut(folder: Path, drop: Any, keep: Any, **changes: Any) -> Path:
    view = ModelView.open(write_tiny("llama", folder / "dense", intermediate_size=512, **changes))
    (folder / "cut").mkdir()
    engine.apply(view, Plan.make(view, drop, keep), folder / "cut")
    return folder / "cut"


def test_folder_computes_the_same_without_prunekit(tmp_path: Path) -> None:
    """Attention missing in block 0, where a cache begins; an FFN missing; a block missing; an FFN of half the width."""
    drop = ["blocks.0.attention", "blocks.1.ffn", "blocks.3.attention", "blocks.3.ffn"]
    folder = cut(tmp_path, drop, {"blocks.2.ffn.neurons": range(256)})
    report = export_decilm(folder, tmp_path / "deci")
    assert (report.blocks, report.without_attention, report.without_ffn) == (4, 2, 2)
    assert report.loads["vLLM"].startswith("no: its class expects attention in block 0")
    config = json.loads((tmp_path / "deci" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    none = {"no_op": True, "replace_with_linear": False}
    assert config["block_configs"][0] == {
        "attention": {**none, "n_heads_in_group": None},
        "ffn": {"no_op": False, "replace_with_linear": False, "ffn_mult": 24.0},
    }
    assert config["block_configs"][2]["ffn"]["ffn_mult"] == 12.0
    assert not {"prunekit", "layer_types"} & set(config)
    checked = verify(tmp_path / "deci", folder)
    assert checked.ok, checked.problems
    names = {check.name for check in checked.checks}
    assert {"loads by its own modeling file", "cache and no cache agree by its own modeling file"} <= names
    assert "cache holds what attention needs by its own modeling file" in names


def test_entries_give_the_shapes_of_the_tensors_as_vllm_reckons_them(tmp_path: Path) -> None:
    """What `DeciLMDecoderLayer` builds (nemotron_nas.py in vllm@00bd149, read and not run) is what the files hold."""
    drop = ["blocks.1.attention", "blocks.2.ffn", "blocks.3.attention", "blocks.3.ffn"]
    folder = cut(tmp_path, drop, {"blocks.1.ffn.neurons": range(256)})
    export_decilm(folder, tmp_path / "deci")
    config = json.loads((tmp_path / "deci" / "config.json").read_text())
    shapes = {name: value.shape for name, value in load_file(tmp_path / "deci" / "model.safetensors").items()}
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    assert len(config["block_configs"]) == config["num_hidden_layers"] == 4
    for number, block in enumerate(config["block_configs"]):
        keys, up = (f"model.layers.{number}.{part}.weight" for part in ("self_attn.k_proj", "mlp.up_proj"))
        kv_heads = None if block["attention"]["no_op"] else heads // block["attention"]["n_heads_in_group"]
        assert shapes.get(keys) == (None if kv_heads is None else (kv_heads * hidden // heads, hidden))
        width = None if block["ffn"]["no_op"] else int(2 * block["ffn"]["ffn_mult"] * hidden / 3)
        assert shapes.get(up) == (None if width is None else (width + -width % 256, hidden))


def test_changed_code_is_not_run(tmp_path: Path) -> None:
    folder = cut(tmp_path, ["blocks.1.attention"], {})
    export_decilm(folder, tmp_path / "deci")
    with (tmp_path / "deci" / "modeling_decilm.py").open("a") as file:
        file.write("# changed\n")
    checked = verify(tmp_path / "deci", folder)
    assert [check.name for check in checked.checks if not check.passed] == ["modeling_decilm.py is prunekit's"]
    assert not any("loads" in check.name for check in checked.checks)


@pytest.mark.parametrize(
    ("keep", "changes", "words"),
    [
        ({"blocks.1.ffn.neurons": range(200)}, {}, "multiples of 256"),
        ({"blocks.1.attention.kv_groups": (0,)}, {}, "as many in every block"),
        ({}, {"head_dim": 16}, "as many in every block"),
    ],
)
def test_what_block_configs_cannot_say_is_refused(tmp_path: Path, keep: Any, changes: Any, words: str) -> None:
    with pytest.raises(PlanError, match="cannot be DeciLM") as caught:
        export_decilm(cut(tmp_path, [], keep, **changes), tmp_path / "deci")
    assert words in caught.value.why
    assert not (tmp_path / "deci").exists()


def test_entries_are_read_by_attribute_and_stored_as_json() -> None:
    """As vLLM reads them; heads of a KV group may differ by block."""
    from prunekit.modeling.configuration_decilm import DeciLMConfig, ffn_width
    from prunekit.modeling.modeling_decilm import DeciLMForCausalLM

    entry = {"attention": {"no_op": False, "n_heads_in_group": 4}, "ffn": {"no_op": False, "ffn_mult": 12.0}}
    config = DeciLMConfig(
        vocab_size=9,
        hidden_size=32,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        block_configs=[entry],
    )
    assert config.block_configs[0].attention.n_heads_in_group == 4
    assert json.loads(config.to_json_string())["block_configs"] == [entry]
    assert ffn_width(5.25, 4096) == 14336
    model = DeciLMForCausalLM(config)
    layer = model.model.layers[0]
    assert tuple(layer.self_attn.k_proj.weight.shape) == (8, 32)
    assert tuple(layer.mlp.up_proj.weight.shape) == (256, 32)
    config.block_configs = [{**entry, "ffn": {"no_op": False, "replace_with_linear": True}}]
    with pytest.raises(ValueError, match="replace_with_linear"):
        DeciLMForCausalLM(config)
