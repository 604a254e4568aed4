"""The files beside `model.onnx`: configuration, tokenizer and image processor, readable by ONNX runtimes.

optimum-onnx 0.1.0 runs on transformers 4.57, which knows neither the tokenizer classes of transformers 5 nor
prunekit's model types, so both get the names that 4.57 knows; nothing of it changes a token or a number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from prunekit.core.files import write_json

_COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# Tokenizer classes of transformers 5 that are nothing but a tokenizer.json.
_GENERIC_TOKENIZERS = ("TokenizersBackend", "TokenizersBackendFast")


def write_sidecar(model_folder: Path, folder: Path) -> None:
    """Copies what an ONNX folder needs besides the graph.

    Args:
        model_folder: the checkpoint folder the graph was made from.
        folder: the ONNX folder; its `config.json` and tokenizer files are written.
    """
    for name in _COPIED:
        source = model_folder / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.is_file():
            shutil.copyfile(source, folder / name)
    tokenizer = model_folder / "tokenizer_config.json"
    if tokenizer.is_file():
        write_json(folder / "tokenizer_config.json", portable_tokenizer(json.loads(tokenizer.read_text("utf-8"))))
    config = json.loads((model_folder / "config.json").read_text("utf-8"))
    write_json(folder / "config.json", portable_config(config))


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Configuration of an ONNX folder: a stock model type, whatever the layers of the graph look like.

    A heterogeneous model keeps its `prunekit` section, which says how the layers differ; the graph needs none of it.
    """
    section = config.get("prunekit")
    if not isinstance(section, dict) or "base_model_type" not in section:
        return dict(config)
    plain = {key: value for key, value in config.items() if key != "auto_map"}
    plain["model_type"] = section["base_model_type"]
    plain["architectures"] = [name.removeprefix("Prunekit") for name in config.get("architectures") or ()]
    return plain


def portable_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """Tokenizer configuration that transformers 4.57 and 5 read alike."""
    plain = {key: value for key, value in config.items() if key != "auto_map"}
    if plain.get("tokenizer_class") in _GENERIC_TOKENIZERS:
        plain["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = plain.get("extra_special_tokens")
    if isinstance(extra, list):
        # transformers 5 writes a list here, 4.57 wants a mapping here and its lists under the older name.
        del plain["extra_special_tokens"]
        plain["additional_special_tokens"] = extra
    return plain
