"""Small models with a real tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from prunekit.checkpoint.sources import resolve
from tests.tiny import write_tiny

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`small(family)`: folder of a tiny model of the family that reads with SmolLM2's tokenizer; do not write to it."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            source = resolve("smollm2-135m-instruct").folder
            made[family] = write_tiny(family, tmp_path_factory.mktemp("small") / family, vocab_size=49152)
            for name in _TOKENIZER:
                shutil.copyfile(source / name, made[family] / name)
        return made[family]

    return folder
