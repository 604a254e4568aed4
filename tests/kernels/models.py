"""Models of a few thousand weights whose steps patterns are put on."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip


def llama(**sizes):
    """A seeded model that takes no gradients, with these sizes instead."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).eval().requires_grad_(False)
