"""Writes a Llama-shaped bfloat16 checkpoint of a given size with random weights: sharded, few rows in memory at a time.

python benchmarks/make_checkpoint.py FOLDER --gigabytes 3
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 2048, 5632, 32, 8, 32000
KV = HIDDEN // HEADS * KV_HEADS
ROWS_AT_ONCE = 4096
Shapes = list[tuple[str, tuple[int, ...]]]


def block(index: int) -> Shapes:
    at = f"model.layers.{index}"
    return [
        (f"{at}.input_layernorm.weight", (HIDDEN,)),
        (f"{at}.mlp.down_proj.weight", (HIDDEN, FFN)),
        (f"{at}.mlp.gate_proj.weight", (FFN, HIDDEN)),
        (f"{at}.mlp.up_proj.weight", (FFN, HIDDEN)),
        (f"{at}.post_attention_layernorm.weight", (HIDDEN,)),
        (f"{at}.self_attn.k_proj.weight", (KV, HIDDEN)),
        (f"{at}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
        (f"{at}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
        (f"{at}.self_attn.v_proj.weight", (KV, HIDDEN)),
    ]


def n_bytes(shape: tuple[int, ...]) -> int:
    return 2 * torch.Size(shape).numel()


def shards(shapes: Shapes, most_bytes: int) -> list[Shapes]:
    """Tensors in order, as many to a shard as fit."""
    done: list[Shapes] = [[]]
    for entry in shapes:
        if done[-1] and sum(n_bytes(shape) for _, shape in [*done[-1], entry]) > most_bytes:
            done.append([])
        done[-1].append(entry)
    return done


def values(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[bytes]:
    """Normal weights of standard deviation 0.02, or ones for a norm, a few rows at a time."""
    if len(shape) == 1:
        yield torch.ones(shape, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
        return
    for first in range(0, shape[0], ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, shape[0] - first)
        part = torch.randn((rows, shape[1]), generator=generator).mul_(0.02).to(torch.bfloat16)
        yield part.view(torch.uint8).numpy().tobytes()


def write_shard(file: Path, shapes: Shapes, generator: torch.Generator) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes:
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + n_bytes(shape)]}
        end += n_bytes(shape)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for _, shape in shapes:
            for part in values(shape, generator):
                opened.write(part)


def write_checkpoint(folder: Path, gigabytes: float, shard_bytes: int = 1_000_000_000, seed: int = 0) -> int:
    """Writes the checkpoint and returns its number of blocks.

    Args:
        gigabytes: size of the weights in 10**9 bytes, rounded down to whole blocks; the two tables take 0.26.
    """
    outer: Shapes = [("lm_head.weight", (VOCAB, HIDDEN)), ("model.embed_tokens.weight", (VOCAB, HIDDEN))]
    per_block = sum(n_bytes(shape) for _, shape in block(0))
    blocks = max(1, int((gigabytes * 1e9 - sum(n_bytes(shape) for _, shape in outer)) // per_block))
    shapes = [*outer, *(entry for index in range(blocks) for entry in block(index)), ("model.norm.weight", (HIDDEN,))]
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    split = shards(shapes, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(split, 1):
        file = f"model-{number:05d}-of-{len(split):05d}.safetensors"
        write_shard(folder / file, part, generator)
        weight_map |= {name: file for name, _ in part}
    index = {"metadata": {"total_size": sum(n_bytes(shape) for _, shape in shapes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "head_dim": HIDDEN // HEADS,
        "intermediate_size": FFN,
        "max_position_embeddings": 4096,
        "num_attention_heads": HEADS,
        "num_hidden_layers": blocks,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--shard-bytes", type=int, default=1_000_000_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    blocks = write_checkpoint(given.folder, given.gigabytes, given.shard_bytes, given.seed)
    print(f"{given.folder}: {blocks} blocks")


if __name__ == "__main__":
    main()
