"""The DINOv2-small that a package carries as one ONNX file, as the Hugging Face folder that it was exported from."""

from __future__ import annotations

import re
from pathlib import Path

from prunekit.core.errors import CheckpointError
from prunekit.core.files import write_json

_PREFIX = "backbone."
# The exporter names what it had to change by number: the table of positions, in two parts.
_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "qkv_bias": True,
    "dtype": "float32",
}
# 8 x 8 patches: small pictures gain nothing from more, and embed 16 times as fast as at 448 pixels.
_PIXELS = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"height": 112, "width": 112},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def write_dinov2(file: Path, folder: Path) -> None:
    """Writes weights, configuration and preprocessing of the ONNX file's backbone into `folder`.

    Raises:
        CheckpointError: if onnx is not installed.
    """
    import numpy as np

    try:
        from onnx import load, numpy_helper
    except ImportError as error:
        hint = "pip install 'prunekit[onnx]'"
        raise CheckpointError(f"reading `{file.name}` needs the package onnx", hint=hint) from error
    from safetensors.numpy import save_file

    graph = load(str(file), load_external_data=False).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {name.removeprefix(_PREFIX): value for name, value in held.items() if name.startswith(_PREFIX)}
    for node in graph.node:
        weight = next((name for name in node.input if name in held), None)
        path = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if node.op_type == "MatMul" and weight is not None and path is not None:
            # A linear layer, which ONNX stores transposed.
            found[_name(path[1])] = held[weight].T
    found["embeddings.position_embeddings"] = np.concatenate([held[name] for name in _POSITIONS], axis=1)
    found["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    save_file(
        {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_json(folder / "config.json", _CONFIG)
    write_json(folder / "preprocessor_config.json", _PIXELS)


def _name(path: str) -> str:
    """`encoder/layer.0/mlp/fc1` is `encoder.layer.0.mlp.fc1.weight`."""
    return path.replace("/", ".") + ".weight"
