"""Folders loaded into their classes: stock and heterogeneous, whole and damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunekit.core.errors import CheckpointError
from prunekit.modeling.load import load_model, load_tokenizer
from prunekit.modeling.modeling_prunekit import blocks_of
from prunekit.structure.view import ModelView
from tests.heterogeneous import heterogeneous, without
from tests.tiny import EAGER, EXPERTS, FAMILIES, FIXED_HEADS, SEEING, tiny_inputs, tiny_model, write_tiny


def logits(family: str, model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(family))[0]


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_folder_loads_into_its_class(family: str, tmp_path: Path) -> None:
    stock = tiny_model(family)
    stock.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float64")
    assert type(model) is type(stock)
    assert not model.training
    assert model.config._attn_implementation == ("eager" if family == "mpnet" else "sdpa") or family in EAGER
    assert torch.equal(logits(family, model), logits(family, stock))


@pytest.mark.parametrize("family", FAMILIES)
def test_heterogeneous_folder_loads_and_saves_again(family: str, tmp_path: Path) -> None:
    heads = {} if family in FIXED_HEADS else {"num_attention_heads": 2, "num_key_value_heads": 2}
    layers: dict[str, dict[str, Any]] = {
        "00": {"skip": ["attention"]},
        "01": heads,
        "02": {"skip": ["mlp"]},
        "03": {"intermediate_size": 20},
    }
    if family == "mpnet":
        layers["01"]["kept_heads"] = [1, 3]
    first = heterogeneous(tiny_model(family), layers)
    first.save_pretrained(tmp_path / "first")
    second = load_model(tmp_path / "first", dtype="float64")
    assert type(second) is type(first)
    assert torch.equal(logits(family, second), logits(family, first))
    second.save_pretrained(tmp_path / "second")
    third = load_model(tmp_path / "second", dtype="float64")
    assert torch.equal(logits(family, third), logits(family, first))
    configs = [(tmp_path / name / "config.json").read_text() for name in ("first", "second")]
    if family in SEEING:
        # transformers writes the type of the weights into the inner configurations when it has read it once.
        configs = [re.sub(r'\s*"dtype": "float64",?', "", text) for text in configs]
    assert configs[0] == configs[1]
    for name in ("modeling_prunekit.py", "model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_tensors_keep_the_names_of_the_stock_checkpoint(tmp_path: Path) -> None:
    stock = tiny_model("vit")
    stock.save_pretrained(tmp_path / "stock")
    without(stock, (0, "attention")).save_pretrained(tmp_path / "pruned")
    names = {kind: set(load_file(tmp_path / kind / "model.safetensors")) for kind in ("stock", "pruned")}
    assert names["pruned"] < names["stock"]
    gone = names["stock"] - names["pruned"]
    assert all(
        name.startswith(("vit.encoder.layer.0.attention.", "vit.encoder.layer.0.layernorm_before.")) for name in gone
    )
    assert len(gone) == 10


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_keep_the_names_of_the_stock_checkpoint(family: str, tmp_path: Path) -> None:
    stock = tiny_model(family)
    stock.save_pretrained(tmp_path / "stock")
    heterogeneous(stock, {"02": {"num_local_experts": 3}}).save_pretrained(tmp_path / "pruned")
    names = {kind: set(load_file(tmp_path / kind / "model.safetensors")) for kind in ("stock", "pruned")}
    assert names["pruned"] < names["stock"]
    gone = names["stock"] - names["pruned"]
    assert len(gone) == 3
    assert all(".2." in name and ".experts.3." in name for name in gone)


@pytest.mark.parametrize(
    ("family", "head"),
    [("llama", "ForSequenceClassification"), ("bert", "ForMaskedLM"), ("gpt2", "ForTokenClassification")],
)
def test_other_heads_load(family: str, head: str, tmp_path: Path) -> None:
    import transformers

    name = (
        type(tiny_model(family)).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel").removesuffix("Model")
    )
    torch.manual_seed(0)
    config = tiny_model(family).config
    config.pad_token_id = 0
    stock = getattr(transformers, f"{name}{head}")(config).double().eval()
    model = without(stock, (1, "attention"), (2, "mlp"))
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="float64")
    assert type(loaded).__name__ == f"Prunekit{name}{head}"
    assert torch.equal(logits(family, loaded), logits(family, model))


@pytest.mark.parametrize("skips", [(), ((0, "mlp"),)], ids=["stock", "heterogeneous"])
def test_folder_without_architectures_loads_its_base_model(skips: Any, tmp_path: Path) -> None:
    stock = tiny_model("bert")
    (without(stock, *skips) if skips else stock).save_pretrained(tmp_path)
    change(tmp_path, architectures=None)
    assert type(load_model(tmp_path)).__name__ == ("PrunekitBertModel" if skips else "BertModel")


@pytest.mark.parametrize("family", ["mpnet", "bert"])
def test_sentence_encoder_saved_without_the_head_it_names_is_its_base_model(family: str, tmp_path: Path) -> None:
    stock = tiny_model(family)
    stock.save_pretrained(tmp_path / "dense")
    named = type(stock).__name__.replace("Model", "ForMaskedLM")
    change(tmp_path / "dense", architectures=[named])
    model = load_model(tmp_path / "dense", dtype="float64")
    assert type(model) is type(stock)
    assert torch.equal(logits(family, model), logits(family, stock))
    view = ModelView.open(tmp_path / "dense")
    assert (view.config["architectures"], view.tied) == ([type(stock).__name__], False)


def test_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    write_tiny("gpt2", tmp_path, dtype=torch.bfloat16)
    assert load_model(tmp_path).dtype == torch.float32
    assert load_model(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_loading_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_tiny("llama", tmp_path)
    capfd.readouterr()
    load_model(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks `model\.layers\.1\.mlp\.up_proj\.weight`"):
        load_model(tmp_path)


def test_unexpected_tensor_is_named(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"no place for `model\.layers\.9\.mlp\.up_proj\.weight`"):
        load_model(tmp_path)


def test_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    change(tmp_path, intermediate_size=40)
    with pytest.raises(
        CheckpointError, match=r"another shape for `model\.layers\.0\.mlp\.down_proj\.weight` and 11 more"
    ):
        load_model(tmp_path)


def test_random_pooler_is_not_accepted(tmp_path: Path) -> None:
    write_tiny("bert", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("pooler.dense.weight"))
    with pytest.raises(CheckpointError, match=r"lacks `pooler\.dense\.weight`"):
        load_model(tmp_path)


def test_mask_buffers_of_older_versions_are_fine(tmp_path: Path) -> None:
    write_tiny("gpt2", tmp_path)
    buffers = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 128, 128) for i in range(4)}
    rewrite(tmp_path, lambda tensors: tensors.update(buffers))
    assert len(blocks_of(load_model(tmp_path))) == 4


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match="no safetensors"):
        load_model(tmp_path)


def test_damaged_file_is_an_error(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(tmp_path)


def test_unknown_class_is_refused_and_code_of_the_folder_not_run(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    trace = tmp_path / "it ran"
    (tmp_path / "own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    change(tmp_path, architectures=["OwnModel"], auto_map={"AutoModel": "own.OwnModel"})
    with pytest.raises(CheckpointError, match="no class `OwnModel`") as caught:
        load_model(tmp_path)
    assert "trust_remote_code" in caught.value.hint
    assert not trace.exists()


def test_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(write_tiny("llama", tmp_path)) is None


def test_damaged_tokenizer_is_an_error(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path)
