"""Small models with a real tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunekit.checkpoint.sources import resolve
from tests.tiny import write_tiny

# Tiny families with other settings.
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-no-window": ("qwen2", {"use_sliding_window": False}),
    "llama-256": ("llama", {"intermediate_size": 256, "attention_bias": False}),
    "gpt2-ids": ("gpt2", {"bos_token_id": 1, "eos_token_id": 2}),
    "llama-3.1": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`small(name)`: folder of a tiny model of a family or a variant, with SmolLM2's tokenizer; do not write to it."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            source = resolve("smollm2-135m-instruct").folder
            kind, changes = _VARIANTS.get(family, (family, {}))
            made[family] = write_tiny(kind, tmp_path_factory.mktemp("small") / family, vocab_size=49152, **changes)
            for name in _TOKENIZER:
                shutil.copyfile(source / name, made[family] / name)
        return made[family]

    return folder
