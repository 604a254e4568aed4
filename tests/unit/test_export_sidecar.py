"""The files beside an ONNX graph: what optimum-onnx on transformers 4.57 can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunekit.export._sidecar import portable_config, portable_tokenizer, write_sidecar

HETEROGENEOUS: dict[str, Any] = {
    "model_type": "prunekit_llama",
    "architectures": ["PrunekitLlamaForCausalLM"],
    "auto_map": {"AutoConfig": "modeling_prunekit.PrunekitLlamaConfig"},
    "num_hidden_layers": 4,
    "prunekit": {"schema": 1, "base_model_type": "llama", "per_layer_config": {"01": {"skip": ["attention"]}}},
}


def test_heterogeneous_config_gets_the_stock_type_and_keeps_its_section() -> None:
    plain = portable_config(HETEROGENEOUS)
    assert plain["model_type"] == "llama"
    assert plain["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in plain
    assert plain["prunekit"] == HETEROGENEOUS["prunekit"]
    assert HETEROGENEOUS["model_type"] == "prunekit_llama"


def test_stock_config_stays_as_it_is() -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"], "prunekit": {"source": "x"}}
    assert portable_config(config) == config


def test_tokenizer_class_of_transformers_5_becomes_the_one_both_know() -> None:
    assert portable_tokenizer({"tokenizer_class": "TokenizersBackend"})["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert portable_tokenizer({"tokenizer_class": "BertTokenizer"})["tokenizer_class"] == "BertTokenizer"


def test_list_of_special_tokens_gets_its_older_name() -> None:
    plain = portable_tokenizer({"extra_special_tokens": ["<a>"]})
    assert plain == {"additional_special_tokens": ["<a>"]}
    named = {"extra_special_tokens": {"image_token": "<i>"}}
    assert portable_tokenizer(named) == named


def test_everything_a_runtime_needs_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "onnx"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("t")
    (source / "config.json").write_text(json.dumps(HETEROGENEOUS))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "preprocessor_config.json"):
        (source / name).write_text(name)
    for name in ("model.safetensors", "modeling_prunekit.py", "README.md"):
        (source / name).write_text("not for the ONNX folder")
    write_sidecar(source, target)
    assert sorted(path.name for path in target.iterdir()) == [
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"
    assert json.loads((target / "config.json").read_text())["model_type"] == "llama"
