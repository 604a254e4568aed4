"""Models quantised by bitsandbytes and compressed-tensors: cut, loaded by those packages, and the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from prunekit.modeling.load import load_model
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.tiny import tiny_inputs, write_tiny

pytestmark = pytest.mark.slow
# Attention 0 moves beside FFN 1, whose matrices are plain.
DROP = ("blocks.0.ffn", "blocks.1.attention")
PLAIN = ["lm_head", *(f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down"))]
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "tie_word_embeddings": False}


def write_bitsandbytes(dense: Path, folder: Path, **how: Any) -> None:
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(llm_int8_skip_modules=PLAIN, **how)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder)


def write_nf4(dense: Path, folder: Path) -> None:
    write_bitsandbytes(dense, folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def write_int8(dense: Path, folder: Path) -> None:
    write_bitsandbytes(dense, folder, load_in_8bit=True)


def write_compressed(dense: Path, folder: Path) -> None:
    """Four bits a weight, a scale for each 32."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    model = load_model(dense)
    weights = quantization.QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=PLAIN, format="pack-quantized", quantization_status="frozen"
    )
    quantization.apply_quantization_config(model, config)
    for module in (module for module in model.modules() if hasattr(module, "weight_scale")):
        module.weight_scale.data = module.weight.data.unflatten(1, (-1, 32)).abs().amax(-1) / 7
    compressor = compressors.ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tiny_inputs("llama")).logits
    return found


@pytest.mark.parametrize("write", [write_nf4, write_int8, write_compressed], ids=["nf4", "int8", "compressed"])
def test_cut_computes_what_is_left_of_the_quantised_model(write: Any, tmp_path: Path) -> None:
    dense = write_tiny("llama", tmp_path / "dense", dtype=torch.bfloat16, **SHAPE)
    write(dense, tmp_path / "quantised")
    view = ModelView.open(tmp_path / "quantised")
    assert view.quantised
    (tmp_path / "cut").mkdir()
    assert engine.apply(view, Plan.make(view, DROP), tmp_path / "cut").kind == "repacked"
    model: Any = load_model(tmp_path / "quantised")
    assert not torch.equal(logits(model), logits(load_model(dense)))
    layers = model.model.layers
    layers[1].self_attn, layers[1].input_layernorm = layers[0].self_attn, layers[0].input_layernorm
    del layers[0]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(layers)
    assert torch.equal(logits(load_model(tmp_path / "cut")), logits(model))
