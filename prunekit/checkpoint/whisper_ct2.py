"""The Whisper tiny.en that a package carries as a CTranslate2 file, as the Hugging Face folder it was made from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.checkpoint.ctranslate2 import read_ctranslate2
from prunekit.core.errors import CheckpointError
from prunekit.core.files import write_json

if TYPE_CHECKING:
    import numpy as np

_END, _START, _NO_TIMES, _BEFORE = 50256, 50257, 50362, 50360
_CONFIG = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "is_encoder_decoder": True,
    "vocab_size": 51864,
    "num_mel_bins": 80,
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_layers": 4,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "activation_function": "gelu",
    "scale_embedding": False,
    "tie_word_embeddings": True,
    "bos_token_id": _START,
    "eos_token_id": _END,
    "pad_token_id": _END,
    "decoder_start_token_id": _START,
    "dtype": "float16",
}
_GENERATION = {
    "bos_token_id": _START,
    "eos_token_id": _END,
    "pad_token_id": _END,
    "decoder_start_token_id": _START,
    "no_timestamps_token_id": _NO_TIMES,
    "prev_sot_token_id": _BEFORE,
    "is_multilingual": False,
    "return_timestamps": False,
    "max_initial_timestamp_index": 50,
    "max_length": 448,
}
_SOUND = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "processor_class": "WhisperProcessor",
    "feature_size": 80,
    "sampling_rate": 16000,
    "hop_length": 160,
    "chunk_length": 30,
    "n_fft": 400,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
}
_TOKENS = {
    "tokenizer_class": "WhisperTokenizer",
    "processor_class": "WhisperProcessor",
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "model_max_length": 1024,
    "add_prefix_space": False,
}
# Parts of a block by their names there; the matrices of one name follow each other in one tensor.
_LAYERS = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_OUTER = {
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "layer_norm": "layer_norm",
    "conv1": "conv1",
    "conv2": "conv2",
}
_KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}


def write_whisper(file: Path, folder: Path) -> None:
    """Writes weights, configuration, tokenizer and preprocessing into `folder`; the file has others of its own beside.

    Raises:
        CheckpointError: if the file is another one, or what lies beside it is damaged.
    """
    import numpy as np
    from safetensors.numpy import save_file

    held = read_ctranslate2(file, "WhisperSpec")
    found = {name: np.ascontiguousarray(value) for name, value in _weights(held)}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    about = _beside(file)
    generation = {
        **_GENERATION,
        "suppress_tokens": about["suppress_ids"],
        "begin_suppress_tokens": about["suppress_ids_begin"],
        "alignment_heads": about["alignment_heads"],
    }
    write_json(folder / "config.json", _CONFIG)
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "preprocessor_config.json", _SOUND)
    write_json(folder / "tokenizer_config.json", _TOKENS)
    shutil.copyfile(file.with_name("tokenizer.json"), folder / "tokenizer.json")


def _beside(file: Path) -> dict[str, Any]:
    """What CTranslate2 keeps of the model's generation configuration."""
    try:
        about = json.loads(file.with_name("config.json").read_text("utf-8"))
        wanted = ("suppress_ids", "suppress_ids_begin", "alignment_heads")
        return {name: about[name] for name in wanted}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"`config.json` beside `{file.name}` is damaged", why=str(error), at=str(file)) from error


def _weights(held: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors by their names in transformers, without settings and without the head that shares the embedding."""
    for name, value in held.items():
        stack, _, rest = name.partition("/")
        part, _, kind = rest.rpartition("/")
        layer = re.fullmatch(r"layer_(\d+)/(.+)", part)
        if kind not in _KINDS:
            continue
        if part in _OUTER:
            yield f"model.{stack}.{_OUTER[part]}.{_KINDS[kind]}", value
        elif layer is not None and layer[2] in _LAYERS:
            targets = _LAYERS[layer[2]]
            rows = len(value) // len(targets)
            for i, target in enumerate(targets):
                # Keys have no bias; the file fills it with zeros.
                if not (target.endswith("k_proj") and kind == "bias"):
                    own = value[i * rows : (i + 1) * rows]
                    yield f"model.{stack}.layers.{layer[1]}.{target}.{_KINDS[kind]}", own
