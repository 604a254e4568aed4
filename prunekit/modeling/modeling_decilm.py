"""Llama whose blocks differ as `block_configs` says: built as transformers builds it, then every block is made its own.

Tensors have Llama's names; those of sub-layers that are `no_op` are absent. prunekit copies this file and
`configuration_decilm.py` into the folders it writes in that format.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from .configuration_decilm import DeciLMConfig, ffn_width


class NoAttention(nn.Module):
    """Attention that adds nothing to the residual stream, and keeps nothing in the KV cache."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """A zero that takes any shape, and no attention weights."""
        return hidden_states.new_zeros(()), None


class NoFFN(nn.Module):
    """FFN that adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """A zero that takes any shape."""
        return hidden_states.new_zeros(())


class DeciLMForCausalLM(LlamaForCausalLM):
    """`LlamaForCausalLM` of a `DeciLMConfig`.

    Raises:
        ValueError: if `block_configs` has no entry for each block, or replaces a sub-layer by a linear one.
    """

    config_class = DeciLMConfig
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        if len(config.block_configs) != len(self.model.layers):
            raise ValueError(f"`block_configs` has {len(config.block_configs)} entries, not {len(self.model.layers)}")
        cached = 0
        for block, entry in zip(self.model.layers, config.block_configs, strict=True):
            if entry.attention.get("replace_with_linear") or entry.ffn.get("replace_with_linear"):
                raise ValueError("`replace_with_linear` in `block_configs` is not computed here")
            _set_ffn(block, entry.ffn, config)
            # The first layer of a cache is asked how many tokens it holds, so attentions fill it without gaps.
            cached += _set_attention(block, entry.attention, config, cached)

    # transformers looks for this in the text of the file that a class is from, which here is not Llama's.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


def _set_attention(block: Any, part: Any, config: DeciLMConfig, number: int) -> int:
    """Gives a block its attention, as layer `number` of the cache; returns how many layers of it were taken."""
    if part.no_op:
        block.input_layernorm, block.self_attn = nn.Identity(), NoAttention()
        return 0
    kv_heads = config.num_attention_heads // (part.n_heads_in_group or 1)
    if kv_heads != config.num_key_value_heads:
        own = copy.copy(config)
        own.num_key_value_heads = kv_heads
        block.self_attn = LlamaAttention(own, number)
        # A copy would not hear of another attention implementation.
        block.self_attn.config = config
    block.self_attn.layer_idx = number
    return 1


def _set_ffn(block: Any, part: Any, config: DeciLMConfig) -> None:
    """Gives a block its FFN."""
    if part.no_op:
        block.post_attention_layernorm, block.mlp = nn.Identity(), NoFFN()
        return
    width = ffn_width(part.ffn_mult, config.hidden_size)
    if width != config.intermediate_size:
        own = copy.copy(config)
        own.intermediate_size = width
        block.mlp = LlamaMLP(own)
