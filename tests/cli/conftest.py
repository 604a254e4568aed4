"""Runs one verb the way the command line does, without the other verbs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """`invoke(verb, *arguments)`: what the verb printed and raised."""

    def run(verb: Callable[..., None], *arguments: object) -> Result:
        app = typer.Typer()
        app.command()(verb)
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe that parses; its model does not exist."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "schema: 1\n"
        "model: {source: no-such-model}\n"
        "steps:\n"
        "  - remove: sublayers\n"
        "    by: {search: finercut}\n"
        "    budget: {remove: 0.2, of: params}\n"
    )
    return path


def row(block: int, attention: str = "kept", ffn: str = "kept") -> dict[str, Any]:
    """A layer map row as JSON."""
    cells = {"attention": attention, "ffn": ffn}
    return {"block": block, **{kind: {"state": state, "widths": {}} for kind, state in cells.items()}}


@pytest.fixture
def result() -> SimpleNamespace:
    """What `pipeline.run` returns, with numbers easy to recognise; one expectation, met."""
    data = {
        "output": "out",
        "layout": "stock",
        "layer_map": [row(0), row(1, attention="removed", ffn="removed")],
        "before": {"params": 40_000_000, "perplexity": 20.0, "sample": "the [dense] model"},
        "after": {"params": 30_000_000, "perplexity": 25.0, "sample": "the cut model"},
        "loads": {"transformers": "AutoModelForCausalLM"},
        "expectations": [{"name": "perplexity_max", "limit": 30.0, "value": 25.0, "ok": True}],
    }
    return SimpleNamespace(data=data, to_json=lambda: json.loads(json.dumps(data)))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a seeded Llama: 4 blocks, 4 heads in 2 KV groups of width 8, 48 neurons, tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tiny_llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
