"""GGUF files: the packaged model converted, and files that are not what they say."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from prunekit.checkpoint import gguf as converter
from prunekit.checkpoint.packaged import packaged_file
from prunekit.checkpoint.reader import Checkpoint
from prunekit.checkpoint.sources import resolve
from prunekit.core.errors import CheckpointError

HIDDEN, FFN, HEADS, BLOCKS, WORDS = 16, 32, 2, 2, 8


def write_tiny_gguf(path: Path, leave_out: str = "") -> dict[str, np.ndarray]:
    """A Llama of two blocks; returns its tensors by their GGUF names."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (WORDS, HIDDEN), "output_norm.weight": (HIDDEN,), "output.weight": (WORDS, HIDDEN)}
    for block in range(BLOCKS):
        shapes |= {f"blk.{block}.{name}.weight": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{block}.attn_{x}.weight": (HIDDEN, HIDDEN) for x in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{x}.weight": (FFN, HIDDEN) for x in ("gate", "up")}
        shapes |= {f"blk.{block}.ffn_down.weight": (HIDDEN, FFN)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items() if name != leave_out}

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab", "c", "d", "e"])
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_gguf_file_becomes_a_folder_once(tmp_path: Path) -> None:
    tensors = write_tiny_gguf(tmp_path / "tiny.gguf")
    found = resolve(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")
    assert (found.kind, found.name) == ("gguf", "tiny")
    checkpoint = Checkpoint.open(found.folder)
    assert len(checkpoint.tensors) == len(tensors)
    assert torch.equal(
        checkpoint.read("model.layers.1.mlp.down_proj.weight"), torch.from_numpy(tensors["blk.1.ffn_down.weight"])
    )
    config = json.loads((found.folder / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["num_hidden_layers"]) == ("llama", "float32", BLOCKS)

    written = (found.folder / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "tiny.gguf").rename(tmp_path / "renamed.gguf")
    again = resolve(str(tmp_path / "renamed.gguf"), cache=tmp_path / "cache")
    assert (again.name, again.folder) == ("renamed", found.folder)
    assert (found.folder / "model.safetensors").stat().st_mtime_ns == written


def test_missing_tensor_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "part.gguf", leave_out="blk.1.ffn_down.weight")
    with pytest.raises(CheckpointError, match=r"cannot convert `part\.gguf`") as caught:
        resolve(str(tmp_path / "part.gguf"), cache=tmp_path / "cache")
    assert "`model.layers.1.mlp.down_proj.weight`" in caught.value.why
    assert [path.suffix for path in (tmp_path / "cache" / "gguf").iterdir()] == [".lock"]


def test_cut_file_is_refused(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "cut.gguf")
    whole = (tmp_path / "cut.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cannot convert `cut\.gguf`") as caught:
        resolve(str(tmp_path / "cut.gguf"), cache=tmp_path / "cache")
    assert caught.value.why


def test_converter_that_dies_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(converter.sys, "executable", "/bin/false")
    with pytest.raises(CheckpointError) as caught:
        resolve(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")
    assert caught.value.why == "the converter ended with code 1"


def test_packaged_model_keeps_tokenizer_template_and_generation_config() -> None:
    from transformers import AutoTokenizer, GenerationConfig

    found = resolve("smollm2-135m-instruct")
    assert (found.kind, found.name) == ("packaged", "smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    text = "In 1998 they sold 1234 boats, naïve as ever."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")
    settings = json.loads((found.folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert GenerationConfig.from_pretrained(found.folder).eos_token_id == 2

    checkpoint = Checkpoint.open(found.folder)
    assert len(checkpoint.tensors) == 272
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F32"}


def test_converted_weights_are_those_of_the_file() -> None:
    reader = gguf.GGUFReader(packaged_file("smollm2-135m-instruct"))
    source = next(tensor for tensor in reader.tensors if tensor.name == "blk.7.ffn_up.weight")
    weights = torch.from_numpy(gguf.dequantize(source.data, source.tensor_type))
    checkpoint = Checkpoint.open(resolve("smollm2-135m-instruct").folder)
    assert torch.equal(checkpoint.read("model.layers.7.mlp.up_proj.weight"), weights)


def test_packaged_encoder_is_unpacked() -> None:
    found = resolve("all-minilm-l6-v2")
    checkpoint = Checkpoint.open(found.folder)
    assert checkpoint.config["model_type"] == "bert"
    assert checkpoint.tensors["embeddings.word_embeddings.weight"].shape == (30522, 384)
