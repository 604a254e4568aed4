"""Models for tests of structure and configuration, and the number of damaged checkpoints that were tried."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunekit.structure.view import ModelView
from tests.broken import COUNTS
from tests.tiny import write_tiny


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many there were; only where one process ran the tests."""
    if COUNTS["tried"]:
        tried, refused = COUNTS["tried"], COUNTS["refused"]
        terminalreporter.write_line(f"damaged checkpoints: {tried:,} tried, {refused:,} refused, the others read")


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., ModelView]:
    """`opened(family, changes, without)`: a tiny model whose config.json was changed by hand."""

    def write(family: str, changes: dict[str, Any] | None = None, without: tuple[str, ...] = ()) -> ModelView:
        folder = write_tiny(family, tmp_path / "dense")
        config = json.loads((folder / "config.json").read_text()) | (changes or {})
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in without}))
        return ModelView.open(folder)

    return write
