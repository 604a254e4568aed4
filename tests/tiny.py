"""Seeded models of a few thousand weights, one a family, for unit tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

HIDDEN, FFN, HEADS, KV_HEADS, HEAD, VOCAB, BLOCKS = 32, 48, 4, 2, 8, 64, 4
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ENCODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
}
_SEEING = {
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    },
    "image_token_id": 2,
}
_IMAGES = {"image_size": 16, "patch_size": 8}
_MODERNBERT_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "cls_token_id": 2, "sep_token_id": 1}
_TOWER_IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
_EVERY_OTHER = ["sliding_attention", "full_attention"] * (BLOCKS // 2)
# Family: configuration class, model class, arguments.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_LLAMA, "attention_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_LLAMA, "sliding_window": 6, "tie_word_embeddings": False}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**_LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA),
    "smollm3": (
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {**_LLAMA, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_LLAMA, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_LLAMA, "sliding_window": 6, "query_pre_attn_scalar": 12}),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_LLAMA, "sliding_window": 6, "query_pre_attn_scalar": 12, "layer_types": _EVERY_OTHER},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**_LLAMA, "tie_word_embeddings": False}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": HEADS, "n_inner": FFN, "n_positions": 128},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **_LLAMA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
        },
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**_ENCODER, "vocab_size": VOCAB, "max_position_embeddings": 128, "rotary_pct": 0.5, "eos_token_id": 2},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS,
            "ffn_dim": FFN,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 24,
            "pad_token_id": 0,
        },
    ),
    "llava": (
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {"text_config": {**_LLAMA, "model_type": "llama", "tie_word_embeddings": False}, **_SEEING},
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **_LLAMA,
                "tie_word_embeddings": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            },
            "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "hidden_size": HIDDEN},
            "image_token_id": 2,
            "video_token_id": 1,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                **_LLAMA,
                "tie_word_embeddings": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": HIDDEN,
                "fullatt_block_indexes": [0],
            },
            "image_token_id": 2,
            "video_token_id": 1,
        },
    ),
    "smolvlm": (
        "SmolVLMConfig",
        "SmolVLMForConditionalGeneration",
        {
            "text_config": {**_LLAMA, "model_type": "llama", "tie_word_embeddings": False},
            **_SEEING,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
    ),
    "bert": ("BertConfig", "BertModel", {**_ENCODER, "vocab_size": VOCAB, "max_position_embeddings": 128}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**_ENCODER, "vocab_size": VOCAB}),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", {**_ENCODER, "vocab_size": VOCAB}),
    "mpnet": ("MPNetConfig", "MPNetModel", {**_ENCODER, "vocab_size": VOCAB}),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": FFN, "n_layers": BLOCKS, "n_heads": HEADS},
    ),
    "electra": ("ElectraConfig", "ElectraForPreTraining", {**_ENCODER, "vocab_size": VOCAB, "embedding_size": 16}),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {**_ENCODER, **_MODERNBERT_IDS, "vocab_size": VOCAB, "local_attention": 4},
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", {**_ENCODER, **_IMAGES, "num_labels": 5}),
    "deit": ("DeiTConfig", "DeiTForImageClassification", {**_ENCODER, **_IMAGES, "num_labels": 5}),
    "dinov2": ("Dinov2Config", "Dinov2Model", {**_ENCODER, **_IMAGES, "mlp_ratio": 2}),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel", {**_ENCODER, **_IMAGES}),
    "clip_text_model": ("CLIPTextConfig", "CLIPTextModel", {**_ENCODER, **_TOWER_IDS}),
    "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel", {**_ENCODER, **_IMAGES}),
    "siglip_text_model": ("SiglipTextConfig", "SiglipTextModel", {**_ENCODER, **_TOWER_IDS}),
    "videomae": (
        "VideoMAEConfig",
        "VideoMAEForVideoClassification",
        {**_ENCODER, **_IMAGES, "num_frames": 4, "num_labels": 5},
    ),
}
# Families with an encoder and a decoder, whose depths differ.
_STACKS = {"vocab_size": VOCAB, "d_model": HIDDEN, "pad_token_id": 0, "eos_token_id": 2}
_T5 = {**_STACKS, "d_kv": HEAD, "d_ff": FFN, "num_layers": BLOCKS, "num_decoder_layers": BLOCKS - 1, "num_heads": HEADS}
_T5 |= {"decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
TWO_STACKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **_STACKS,
            "num_mel_bins": 8,
            "encoder_layers": BLOCKS - 1,
            "decoder_layers": BLOCKS,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": FFN,
            "decoder_ffn_dim": FFN - 8,
            "max_source_positions": 10,
            "max_target_positions": 32,
            "bos_token_id": 1,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
        },
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
}
IMAGE_MODELS = ("vit", "deit", "dinov2", "clip_vision_model", "siglip_vision_model", "videomae")
# FFN neurons where they are not FFN.
NEURONS = {"dinov2": 2 * HIDDEN}
ENCODERS = ("bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "electra", "modernbert")
TEXT_TOWERS = ("clip_text_model", "siglip_text_model")
DECODERS = tuple(family for family in FAMILIES if family not in (*ENCODERS, *TEXT_TOWERS, *IMAGE_MODELS))
# Base models, which give hidden states.
WITHOUT_LOGITS = tuple(family for family, (_, name, _) in FAMILIES.items() if re.search(r"(?<!LMHead)Model$", name))
# Several query heads to a key and value.
GROUPED = tuple(family for family in DECODERS if family not in ("gpt2", "gpt_neox", "opt"))
# A language model inside a model that sees.
SEEING = ("llava", "qwen2_vl", "qwen2_5_vl", "smolvlm")
# Experts in the FFN of most blocks.
EXPERTS = ("mixtral", "qwen3_moe")
# Attention and FFN of a block read the same stream.
PARALLEL = ("gpt_neox",)
SEQUENTIAL = tuple(family for family in FAMILIES if family not in PARALLEL)
# No attention of torch's own, for a soft cap: the model's softmax is in float32, and in float64 positions that are
# padding on the left make it not a number.
EAGER = ("gemma2",)
# Heads that cannot go, since a norm runs over all of them.
FIXED_HEADS = ("olmo2",)


@contextmanager
def built_in(dtype: torch.dtype) -> Iterator[None]:
    """Models get this type, and constants that they hold its precision, as when they are loaded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Model of a family in eval mode; norms and biases are random too, so that a lost one shows."""
    import transformers

    config_name, model_name, arguments = (FAMILIES | TWO_STACKS)[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**{**arguments, **changes})
    with built_in(dtype):
        model = getattr(transformers, model_name)(config).to(dtype).eval()
    if family in EXPERTS and dtype == torch.float64:
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.15
            parameter.add_(scale * torch.randn(parameter.shape, dtype=dtype))
    return model


def write_tiny(family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Folder of `tiny_model`; weights are stored as `dtype`."""
    tiny_model(family, seed, dtype, **changes).save_pretrained(folder)
    return folder


def tiny_inputs(family: str, batch: int = 2, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of a family: token ids, or pixels or sound as float64."""
    generator = torch.Generator().manual_seed(seed)
    if family in TWO_STACKS:
        written = torch.randint(3, VOCAB, (batch, length), generator=generator)
        if family == "whisper":
            heard = torch.randn(batch, 8, 20, generator=generator, dtype=torch.float64)
            return {"input_features": heard, "decoder_input_ids": written}
        read = torch.randint(3, VOCAB, (batch, length + 4), generator=generator)
        return {"input_ids": read, "decoder_input_ids": written}
    if family in IMAGE_MODELS:
        frames = [4] if family == "videomae" else []
        return {"pixel_values": torch.randn(batch, *frames, 3, 16, 16, generator=generator, dtype=torch.float64)}
    return {"input_ids": torch.randint(3, VOCAB, (batch, length), generator=generator)}


def dinov2_linears() -> tuple[str, ...]:
    """Names of layers in DINOv2's attention: queries, keys, values, output; transformers 5.17 has others."""
    from transformers.models.dinov2 import modeling_dinov2

    if hasattr(modeling_dinov2, "Dinov2SelfAttention"):
        return (*(f"attention.attention.{part}" for part in ("query", "key", "value")), "attention.output.dense")
    return tuple(f"attention.{part}_proj" for part in "qkvo")
