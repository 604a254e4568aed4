"""GGUF files in llama.cpp give torch's logits and greedy tokens, whatever was cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, trainers

from prunekit.checkpoint.sources import resolve
from prunekit.export.gguf import export_gguf
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.served import PROMPTS, LlamaCpp, torch_run
from tests.tiny import BLOCKS, write_tiny

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf", reason="the package gguf is not installed")
pytestmark = pytest.mark.slow
BLOCK = ["blocks.1.attention", "blocks.1.ffn"]
PAIR = ["blocks.1.ffn", "blocks.2.attention"]
ONE_GROUP = {f"blocks.{i}.attention.kv_groups": (1,) for i in range(BLOCKS)}
NARROW = {f"blocks.{i}.ffn.neurons": range(8, 40) for i in range(BLOCKS)}
UNEVEN = {"blocks.1.ffn.neurons": range(5, 25), "blocks.2.attention.kv_groups": (1,)}
HOLES = ["blocks.0.attention", "blocks.2.ffn", "blocks.3.ffn"]


def compared(folder: Path, file: Path, new_tokens: int = 12) -> float:
    """Largest difference of logits, in parts of the largest logit; ids and tokens are the same."""
    llama, worst = LlamaCpp(file), 0.0
    for prompt, (ids, logits, tokens) in zip(PROMPTS, torch_run(folder, new_tokens), strict=True):
        assert llama.ids(prompt) == ids
        found, made = llama.run(ids, new_tokens)
        assert made == tokens
        worst = max(worst, float(np.abs(found - logits).max() / np.abs(logits).max()))
    return worst


@pytest.mark.parametrize(
    ("family", "drop", "keep", "graph"),
    [
        ("llama", BLOCK, ONE_GROUP | NARROW, "llama"),
        ("llama", PAIR, {}, "llama"),
        ("llama", HOLES, UNEVEN, "deci"),
        ("qwen2-no-window", BLOCK, NARROW, "qwen2"),
        ("qwen2-no-window", HOLES, UNEVEN, "deci"),
        ("qwen3", PAIR, ONE_GROUP, "qwen3"),
        ("gpt2-ids", PAIR, {}, "gpt2"),
        ("gpt2-ids", [], NARROW, "gpt2"),
    ],
)
def test_cut_models_agree_with_torch(
    small: Callable[[str], Path], tmp_path: Path, family: str, drop: list[str], keep: dict[str, Any], graph: str
) -> None:
    view = ModelView.open(small(family))
    (tmp_path / "cut").mkdir()
    left = {address: kept for address, kept in keep.items() if address.rpartition(".")[0] not in drop}
    engine.apply(view, Plan.make(view, drop, left), tmp_path / "cut")
    report = export_gguf(tmp_path / "cut", tmp_path / "gguf", type="f32")
    assert report.architecture == graph
    # llama.cpp looks GELU up in a table of float16.
    limit = 1e-3 if graph == "gpt2" else 1e-5
    assert compared(tmp_path / "cut", tmp_path / "gguf" / report.file) < limit


def test_frequencies_of_llama_3_agree_with_torch(small: Callable[[str], Path], tmp_path: Path) -> None:
    folder = small("llama-3.1")
    report = export_gguf(folder, tmp_path / "gguf", type="f32")
    assert compared(folder, tmp_path / "gguf" / report.file) < 1e-5


def test_sentencepiece_gives_the_same_ids(tmp_path: Path) -> None:
    """A tokenizer made as Llama 2's is, of this repository's changelog."""
    text = (Path(__file__).parents[2] / "CHANGELOG.md").read_text("utf-8")
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    tokenizer.train_from_iterator(text.split(), trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in bytes_]
    folder = write_tiny("llama", tmp_path / "m", vocab_size=900)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    report = export_gguf(folder, tmp_path / "gguf")
    llama, tokenizer = LlamaCpp(tmp_path / "gguf" / report.file), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for sample in (*PROMPTS, text[200:500]):
        assert llama.ids(sample) == tokenizer.encode(sample).ids


@pytest.mark.parametrize("type", ["f32", "f16", "q8_0"])
def test_pretrained_model_writes_what_torch_writes(tmp_path: Path, type: Any) -> None:
    """SmolLM2 without two sub-layers half a block apart, a shorter stock model; its q8_0 need not give the same."""
    view = ModelView.open(resolve("smollm2-135m-instruct").folder)
    (tmp_path / "cut").mkdir()
    engine.apply(view, Plan.make(view, ["blocks.11.ffn", "blocks.12.attention"]), tmp_path / "cut")
    report = export_gguf(tmp_path / "cut", tmp_path / "gguf", type=type)
    llama = LlamaCpp(tmp_path / "gguf" / report.file)
    limits = {"f32": 1e-3, "f16": 5e-3, "q8_0": 1e-1}
    for prompt, (ids, logits, tokens) in zip(PROMPTS, torch_run(tmp_path / "cut", 16), strict=True):
        assert llama.ids(prompt) == ids
        found, made = llama.run(ids, 16)
        assert np.abs(found - logits).max() < limits[type] * np.abs(logits).max()
        assert made == tokens or type == "q8_0"
