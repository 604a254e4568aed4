"""Configuration of Llama-shaped models whose blocks differ, as `block_configs`, the format of Nemotron-NAS and Puzzle.

prunekit copies this file and `modeling_decilm.py` into the folders it writes in that format, which is why they import
nothing but torch and transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

# Readers round an FFN's width up to a multiple of this.
FFN_MULTIPLE = 256


class Entry(dict[str, Any]):
    """A part of the configuration that is read by attribute, as vLLM does, and stored as JSON."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig(LlamaConfig):
    """`LlamaConfig` with an entry a block.

    `block_configs[i].attention` has `no_op`, `replace_with_linear` and `n_heads_in_group` (query heads for a KV head),
    `block_configs[i].ffn` has `no_op`, `replace_with_linear` and `ffn_mult` (width by `ffn_width`).
    """

    model_type = "nemotron-nas"

    @property
    def block_configs(self) -> list[Entry]:
        """Entries of the blocks, in order."""
        found: list[Entry] = self.__dict__.get("block_configs", [])
        return found

    @block_configs.setter
    def block_configs(self, entries: list[Any]) -> None:
        self.__dict__["block_configs"] = [
            Entry({name: Entry(part) if isinstance(part, dict) else part for name, part in dict(entry).items()})
            for entry in entries
        ]


def ffn_width(ffn_mult: float, hidden_size: int) -> int:
    """Neurons of an FFN; 1.5 with a hidden width of 512 gives 512."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // FFN_MULTIPLE) * FFN_MULTIPLE
