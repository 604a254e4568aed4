"""GGUF files: what llama.cpp cannot compute is refused, and values, widths and tokenizer are what the model has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prunekit.core.errors import ExportError, PlanError
from prunekit.export._gguf_vocab import pre_tokenizer, read_vocabulary
from prunekit.export.gguf import export_gguf
from prunekit.plan.gguf_rules import gguf_layout
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.tiny import BLOCKS, FFN, VOCAB, write_tiny

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer of a few tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = [chr(97 + n) for n in range(26)]
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", *letters, "ab", "abc"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    return folder


def written(folder: Path, out: Path, **options: Any) -> tuple[Any, Any]:
    report = export_gguf(folder, out, **options)
    return report, gguf.GGUFReader(out / report.file)


def value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def test_file_holds_every_value_once(tmp_path: Path) -> None:
    folder = write_tokenizer(write_tiny("qwen3", tmp_path / "m"))
    report, reader = written(folder, tmp_path / "out")
    view = ModelView.open(folder)
    assert (report.architecture, report.type, report.padding) == ("qwen3", "f32", ())
    assert len(reader.tensors) == len(view.checkpoint.tensors)
    found = next(t for t in reader.tensors if t.name == "blk.2.ffn_down.weight").data
    assert np.array_equal(found, view.checkpoint.read("model.layers.2.mlp.down_proj.weight").numpy())
    assert value(reader, "qwen3.feed_forward_length") == FFN
    assert value(reader, "tokenizer.chat_template") == "{{ messages }}"
    assert value(reader, "tokenizer.ggml.eos_token_id") == 1
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"


def test_rotary_pairs_lie_side_by_side(tmp_path: Path) -> None:
    folder = write_tokenizer(write_tiny("llama", tmp_path / "m"))
    _, reader = written(folder, tmp_path / "out")
    rows = ModelView.open(folder).checkpoint.read("model.layers.1.self_attn.k_proj.weight").numpy()
    found = next(t for t in reader.tensors if t.name == "blk.1.attn_k.weight").data
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert np.array_equal(found, rows[[head * 8 + i for head in range(2) for i in order]])


def test_blocks_that_differ_become_arrays(tmp_path: Path) -> None:
    view = ModelView.open(write_tokenizer(write_tiny("llama", tmp_path / "m")))
    drop = ["blocks.0.attention", "blocks.1.ffn", "blocks.3.ffn"]
    keep = {"blocks.2.ffn.neurons": range(20), "blocks.3.attention.kv_groups": (1,)}
    (tmp_path / "cut").mkdir()
    engine.apply(view, Plan.make(view, drop, keep), tmp_path / "cut")
    report, reader = written(tmp_path / "cut", tmp_path / "out")
    assert report.architecture == "deci"
    assert report.padding == ("blocks.0.attention", "blocks.1.ffn", "blocks.3.ffn")
    assert value(reader, "deci.attention.head_count") == [1, 4, 4, 2]
    assert value(reader, "deci.attention.head_count_kv") == [1, 2, 2, 1]
    assert value(reader, "deci.feed_forward_length") == [FFN, 32, 20, 32]
    zeros = [t for t in reader.tensors if t.name.startswith(("blk.1.ffn", "blk.0.attn"))]
    assert len(zeros) == 9
    assert not any(t.data.any() for t in zeros)


@pytest.mark.parametrize(("type", "error"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2)])
def test_types_keep_values_within_their_precision(tmp_path: Path, type: Any, error: float) -> None:
    folder = write_tokenizer(write_tiny("llama", tmp_path / "m"))
    report, reader = written(folder, tmp_path / "out", type=type)
    # Rows of 48 neurons are no multiple of 32.
    assert report.fallbacks == (BLOCKS if type == "q8_0" else 0)
    stored = next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    exact = ModelView.open(folder).checkpoint.read("model.layers.0.mlp.up_proj.weight").numpy()
    found = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(exact.shape)
    assert 0 < np.abs(found - exact).max() <= error * np.abs(exact).max()
    assert next(t for t in reader.tensors if t.name == "blk.0.attn_norm.weight").data.dtype == np.float32


def test_automatic_type_is_the_checkpoints(tmp_path: Path) -> None:
    folder = write_tokenizer(write_tiny("llama", tmp_path / "m", dtype=torch.bfloat16))
    report, _ = written(folder, tmp_path / "out")
    assert (report.type, report.file) == ("bf16", "model-bf16.gguf")


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gemma2", {}, "llama, mistral, qwen2, qwen3, gpt2"),
        ("mistral", {}, "no sliding window"),
        ("qwen2", {}, "no sliding window"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "`dynamic`"),
        ("llama", {"hidden_act": "gelu"}, "not `gelu`"),
        ("gpt2", {"activation_function": "relu"}, "not `relu`"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("qwen3", {"attention_bias": True}, "`self_attn.o_proj` has no bias"),
    ],
)
def test_families_without_a_graph_are_refused(tmp_path: Path, family: str, changes: Any, words: str) -> None:
    view = ModelView.open(write_tiny(family, tmp_path / "m", **changes))
    with pytest.raises(PlanError) as caught:
        gguf_layout(view, Plan.make(view))
    assert words in f"{caught.value.what} {caught.value.why}"


@pytest.mark.parametrize(
    ("family", "drop", "keep", "words"),
    [
        ("qwen3", ["blocks.1.ffn"], {}, "every block has an attention and an FFN"),
        ("gpt2", [], {"blocks.1.ffn.neurons": range(24)}, "all blocks have the same widths"),
        ("llama", [f"blocks.{i}.attention" for i in range(BLOCKS)], {}, "without attention"),
    ],
)
def test_plans_without_a_graph_are_refused(tmp_path: Path, family: str, drop: Any, keep: Any, words: str) -> None:
    view = ModelView.open(write_tiny(family, tmp_path / "m"))
    with pytest.raises(PlanError) as caught:
        gguf_layout(view, Plan.make(view, drop, keep))
    assert words in caught.value.why


def test_fewer_heads_of_qwen2_are_written_as_deci(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("qwen2", tmp_path / "m", use_sliding_window=False))
    keep = {f"blocks.{i}.attention.kv_groups": (0,) for i in range(BLOCKS)}
    assert gguf_layout(view, Plan.make(view, (), keep)).graph.name == "deci"
    assert gguf_layout(view, Plan.make(view)).graph.name == "qwen2"


def split(pattern: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, {**BYTE_LEVEL, "use_regex": False}]}


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}


@pytest.mark.parametrize(
    ("step", "ignore_merges", "name"),
    [
        (BYTE_LEVEL, False, "gpt-2"),
        (DIGITS, False, "smollm"),
        (split(LLAMA_3), True, "llama-bpe"),
        (split(LLAMA_3.replace("{1,3}", "")), False, "qwen2"),
    ],
)
def test_pre_tokenizers_have_their_names(step: Any, ignore_merges: bool, name: str) -> None:
    data = {"normalizer": None, "pre_tokenizer": step, "model": {"ignore_merges": ignore_merges}}
    assert pre_tokenizer(data) == name


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (split(LLAMA_3), {}),
        (split(r"\w+"), {}),
        ({**BYTE_LEVEL, "add_prefix_space": True}, {}),
        (None, {}),
        (BYTE_LEVEL, {"normalizer": {"type": "Lowercase"}}),
    ],
)
def test_unknown_ways_of_splitting_are_refused(step: Any, changes: Any) -> None:
    data = {"normalizer": None, "pre_tokenizer": step, "model": {"ignore_merges": False}, **changes}
    with pytest.raises(ExportError, match="cannot be said in a GGUF file"):
        pre_tokenizer(data)


def test_rows_without_a_token_are_unused_and_too_many_tokens_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(write_tiny("llama", tmp_path / "m"))
    found = read_vocabulary(folder, VOCAB)
    assert found.tokens[28:31] == ("ab", "abc", "[PAD30]")
    assert found.types[:2] == (int(gguf.TokenType.CONTROL),) * 2
    assert found.types[30] == int(gguf.TokenType.UNUSED)
    assert found.adds == {"bos": False, "eos": False}
    with pytest.raises(ExportError):
        read_vocabulary(folder, 29)


def test_tokens_round_a_text_are_said(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    folder = write_tokenizer(write_tiny("llama", tmp_path / "m"))
    file = str(folder / "tokenizer.json")
    for template, found in (("<s> $A </s>", {"bos": True, "eos": True}), ("<s> $A", {"bos": True, "eos": False})):
        tokenizer = Tokenizer.from_file(file)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=None, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        tokenizer.save(file)
        assert read_vocabulary(folder, VOCAB).adds == found
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    tokenizer.save(file)
    with pytest.raises(ExportError) as caught:
        read_vocabulary(folder, VOCAB)
    assert "other tokens round a text" in caught.value.why


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(write_tiny("llama", tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"layers\.2\.mlp\.up_proj"):
        export_gguf(folder, tmp_path / "out", type="f16")
    assert not (tmp_path / "out").exists()


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tokenizer(write_tiny("llama", tmp_path / "m"))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prunekit.export.gguf._values", fail)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
