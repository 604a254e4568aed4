"""Quantised copies of tiny models, with the tensor names of each method; fp8 also with its true values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Rows and columns that share an fp8 scale.
TILE = 16
# Modules that the copies leave as they are.
PLAIN = ("lm_head", "model.layers.1.mlp", "model.layers.3.self_attn.q_proj")
Parts = dict[str, Tensor]


def fp8(weight: Tensor) -> Parts:
    rows, columns = (-(-size // TILE) for size in weight.shape)
    padded = torch.zeros(rows * TILE, columns * TILE)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    tiles = padded.view(rows, TILE, columns, TILE)
    scale = tiles.abs().amax((1, 3)).clamp(min=1e-6) / torch.finfo(torch.float8_e4m3fn).max
    values = (tiles / scale[:, None, :, None]).view_as(padded)[: weight.shape[0], : weight.shape[1]]
    return {"weight": values.to(torch.float8_e4m3fn).contiguous(), "weight_scale_inv": scale}


def gptq(weight: Tensor) -> Parts:
    n_out, n_in = weight.shape
    return {
        "qweight": torch.randint(2**30, (n_in // 8, n_out), dtype=torch.int32),
        "qzeros": torch.zeros(2, n_out // 8, dtype=torch.int32),
        "scales": torch.rand(2, n_out).half(),
        "g_idx": torch.arange(n_in, dtype=torch.int32) // (n_in // 2),
    }


def awq(weight: Tensor) -> Parts:
    n_out, n_in = weight.shape
    return {
        "qweight": torch.randint(2**30, (n_in, n_out // 8), dtype=torch.int32),
        "qzeros": torch.zeros(2, n_out // 8, dtype=torch.int32),
        "scales": torch.rand(2, n_out).half(),
    }


def nf4(weight: Tensor) -> Parts:
    return {
        "weight": torch.randint(256, (weight.numel() // 2, 1), dtype=torch.uint8),
        "weight.absmax": torch.rand(weight.numel() // 64),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }


def int8(weight: Tensor) -> Parts:
    scale = weight.abs().amax(1)
    rounded = (weight / scale[:, None] * 127).round().to(torch.int8)
    return {"weight": rounded, "SCB": scale, "weight_format": torch.zeros((), dtype=torch.uint8)}


def compressed(weight: Tensor) -> Parts:
    n_out, n_in = weight.shape
    return {
        "weight_packed": torch.randint(2**30, (n_out, n_in // 8), dtype=torch.int32),
        "weight_scale": torch.rand(n_out, 2).bfloat16(),
        "weight_shape": torch.tensor([n_out, n_in]),
    }


# Method: what it makes of a matrix, the rest of its section, and its key for modules left as they are.
METHODS: dict[str, tuple[Callable[[Tensor], Parts], dict[str, Any], str]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [TILE, TILE]}, "modules_to_not_convert"),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4}, "modules_to_not_convert"),
    "awq": (awq, {"quant_method": "awq", "bits": 4}, "modules_to_not_convert"),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "llm_int8_skip_modules"),
    "int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "llm_int8_skip_modules"),
    "compressed": (
        compressed,
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"]}}},
        "ignore",
    ),
}


def write_quantised(dense: Path, folder: Path, method: str) -> Path:
    """A copy of a checkpoint in one file with the matrices of its blocks quantised, but for `PLAIN`."""
    torch.manual_seed(0)
    quantise, section, key = METHODS[method]
    shutil.copytree(dense, folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        module = name.removesuffix(".weight")
        skipped = any(f"{module}.".startswith(f"{plain}.") for plain in PLAIN)
        if ".layers." not in name or tensor.dim() != 2 or skipped or not name.endswith(".weight"):
            tensors[name] = tensor
        else:
            tensors |= {f"{module}.{part}": value for part, value in quantise(tensor.float()).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**section, key: list(PLAIN)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
