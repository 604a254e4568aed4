"""Models for tests of structure and configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunekit.structure.view import ModelView
from tests.tiny import write_tiny


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., ModelView]:
    """`opened(family, changes, without)`: a tiny model whose config.json was changed by hand."""

    def write(family: str, changes: dict[str, Any] | None = None, without: tuple[str, ...] = ()) -> ModelView:
        folder = write_tiny(family, tmp_path / "dense")
        config = json.loads((folder / "config.json").read_text()) | (changes or {})
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in without}))
        return ModelView.open(folder)

    return write
