"""Transformers whose blocks differ: sub-layers missing, or fewer heads and FFN neurons in some blocks than in others.

Each class, such as `PrunekitLlamaForCausalLM`, is the stock one: built as the configuration's global attributes say,
then cut as `config.prunekit["per_layer_config"]` says. It is made when it is first asked for. Tensors keep the names of
the stock checkpoint; those of removed sub-layers are absent. prunekit copies this file into the folders it writes,
which is why it imports nothing but torch and transformers and is longer than other files.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

SCHEMA = 1
# What the configuration calls the kinds of sub-layer, and the widths that a block can have of its own.
SKIPS = {"attention": "attention", "cross_attention": "cross_attention", "mlp": "ffn"}
WIDTHS = (
    "num_attention_heads",
    "num_key_value_heads",
    "cross_attention_heads",
    "intermediate_size",
    "num_local_experts",
)
# Stock model type: how names of stock classes begin, and how those of configuration, base model and heads go on.
# prunekit reads this table without running the file.
CLASSES = {
    "llama": "Llama Config Model ForCausalLM ForSequenceClassification ForTokenClassification",
    "mistral": "Mistral Config Model ForCausalLM ForSequenceClassification ForTokenClassification",
    "qwen2": "Qwen2 Config Model ForCausalLM ForSequenceClassification ForTokenClassification",
    "qwen3": "Qwen3 Config Model ForCausalLM ForSequenceClassification ForTokenClassification",
    "smollm3": "SmolLM3 Config Model ForCausalLM ForSequenceClassification ForTokenClassification",
    "phi3": "Phi3 Config Model ForCausalLM ForSequenceClassification ForTokenClassification",
    "gemma2": "Gemma2 Config Model ForCausalLM ForSequenceClassification ForTokenClassification",
    "gemma3_text": "Gemma3 TextConfig TextModel ForCausalLM TextForSequenceClassification",
    "olmo2": "Olmo2 Config Model ForCausalLM ForSequenceClassification",
    "gpt2": "GPT2 Config Model LMHeadModel ForSequenceClassification ForTokenClassification",
    "mixtral": "Mixtral Config Model ForCausalLM ForSequenceClassification ForTokenClassification",
    "qwen3_moe": "Qwen3Moe Config Model ForCausalLM ForSequenceClassification ForTokenClassification",
    "gpt_neox": "GPTNeoX Config Model ForCausalLM ForSequenceClassification ForTokenClassification",
    "opt": "OPT Config Model ForCausalLM ForSequenceClassification",
    "llava": "Llava Config Model ForConditionalGeneration",
    "qwen2_vl": "Qwen2VL Config Model ForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VL Config Model ForConditionalGeneration",
    "smolvlm": "SmolVLM Config Model ForConditionalGeneration",
    "bert": "Bert Config Model ForPreTraining ForMaskedLM ForQuestionAnswering ForSequenceClassification "
    "ForTokenClassification",
    "roberta": "Roberta Config Model ForMaskedLM ForQuestionAnswering ForSequenceClassification ForTokenClassification",
    "xlm-roberta": "XLMRoberta Config Model ForMaskedLM ForQuestionAnswering ForSequenceClassification "
    "ForTokenClassification",
    "electra": "Electra Config Model ForPreTraining ForMaskedLM ForQuestionAnswering ForSequenceClassification "
    "ForTokenClassification",
    "mpnet": "MPNet Config Model ForMaskedLM ForQuestionAnswering ForSequenceClassification ForTokenClassification",
    "distilbert": "DistilBert Config Model ForMaskedLM ForQuestionAnswering ForSequenceClassification "
    "ForTokenClassification",
    "modernbert": "ModernBert Config Model ForMaskedLM ForQuestionAnswering ForSequenceClassification "
    "ForTokenClassification",
    "vit": "ViT Config Model ForImageClassification",
    "deit": "DeiT Config Model ForImageClassification",
    "dinov2": "Dinov2 Config Model ForImageClassification",
    "videomae": "VideoMAE Config Model ForVideoClassification",
    "clip_vision_model": "CLIPVision Config Model",
    "clip_text_model": "CLIPText Config Model",
    "siglip_vision_model": "SiglipVision Config Model",
    "siglip_text_model": "SiglipText Config Model",
    "whisper": "Whisper Config Model ForConditionalGeneration",
    "t5": "T5 Config Model ForConditionalGeneration",
    "mt5": "MT5 Config Model ForConditionalGeneration",
}
# Stock classes whose Auto class does not follow from their name.
AUTO_CLASSES = {
    "WhisperForConditionalGeneration": "AutoModelForSpeechSeq2Seq",
    "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "MT5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
# What Linear and Conv1D call their two sizes.
_SIDES = {"out": ("out_features", "nf"), "in": ("in_features", "nx")}


class _NoAttention(nn.Module):
    """Attention that adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(()), None


class _NoFFN(nn.Module):
    """FFN, or attention that returns nothing besides, that adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states.new_zeros(())


class _SameAttention(nn.Module):
    """Post-norm attention, residual and norm included, that returns what it got."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states, None


class _SameOutput(nn.Module):
    """Second half of a post-norm FFN, residual and norm included, that returns what the first half got."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return input_tensor


class _SameT5Attention(nn.Module):
    """T5's attention, residual and norm included, that returns what it got; blocks hand the position bias on.

    The first one of a stack makes that bias, and goes on to.
    """

    @classmethod
    def of(cls, attention: Any) -> _SameT5Attention:
        """The one that takes the place of an attention."""
        made, core = cls(), getattr(attention, "SelfAttention", None)
        if core is not None and core.has_relative_attention_bias:
            made.SelfAttention = copy.copy(core)
            made.SelfAttention._modules = {"relative_attention_bias": core.relative_attention_bias}
        return made

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        core: Any = getattr(self, "SelfAttention", None)
        if core is not None and position_bias is None:
            cache = kwargs.get("cache") or kwargs.get("past_key_values")
            new, past = hidden_states.shape[1], cache.get_seq_length() if cache is not None else 0
            length = past + new if attention_mask is None else attention_mask.shape[-1]
            position_bias = core.compute_bias(new, length, device=hidden_states.device, past_seen_tokens=past)
        return hidden_states, position_bias, None


class _OwnNumbers:
    """A configuration of which some numbers are a module's own, for modules that read their sizes from it."""

    def __init__(self, config: Any, **own: Any) -> None:
        self.__dict__.update(own, _shared=config)

    def __getattr__(self, name: str) -> Any:
        if name == "_shared":
            raise AttributeError(name)
        return getattr(self._shared, name)


@dataclass(frozen=True)
class _SubLayer:
    """Where a sub-layer lies in a block.

    Args:
        swaps: modules of the block and what takes their place when the sub-layer is skipped; its norm among them.
        linears: layers with a side that gets narrower: side (`out` or `in`) and what it is a multiple of; `qkv` is
            heads and twice KV heads.
        counts: module that holds head counts as attributes.
        fixed: why no head can go, "" where some can.
        shared: module, and the argument of its forward that has an entry for each head and is the same for all blocks.
        handed_on: whether that argument comes from the block before, and is made by the first one.
    """

    swaps: Mapping[str, type[nn.Module]]
    linears: Mapping[str, tuple[str, str]]
    counts: str
    fixed: str = ""
    shared: tuple[str, str] | None = None
    handed_on: bool = False


@dataclass(frozen=True)
class _Family:
    """Where the blocks of a family are, from its base model on, and what lies inside."""

    blocks: str
    attention: _SubLayer
    ffn: _SubLayer
    cross_attention: _SubLayer | None = None


_SELF_ATTN = {
    "self_attn.q_proj": ("out", "heads"),
    "self_attn.k_proj": ("out", "kv"),
    "self_attn.v_proj": ("out", "kv"),
    "self_attn.o_proj": ("in", "heads"),
}
_GATED = {"mlp.gate_proj": ("out", "ffn"), "mlp.up_proj": ("out", "ffn"), "mlp.down_proj": ("in", "ffn")}
_NO_ATTENTION = {"input_layernorm": nn.Identity, "self_attn": _NoAttention}
_NO_FFN = {"post_attention_layernorm": nn.Identity, "mlp": _NoFFN}
_LLAMA = _Family("layers", _SubLayer(_NO_ATTENTION, _SELF_ATTN, "self_attn"), _SubLayer(_NO_FFN, _GATED, "mlp"))
_PHI3 = _Family(
    "layers",
    _SubLayer(_NO_ATTENTION, {"self_attn.qkv_proj": ("out", "qkv"), "self_attn.o_proj": ("in", "heads")}, "self_attn"),
    _SubLayer(_NO_FFN, {"mlp.gate_up_proj": ("out", "ffn"), "mlp.down_proj": ("in", "ffn")}, "mlp"),
)
_GEMMA = _Family(
    "layers",
    _SubLayer({**_NO_ATTENTION, "post_attention_layernorm": nn.Identity}, _SELF_ATTN, "self_attn"),
    _SubLayer(
        {"pre_feedforward_layernorm": nn.Identity, "mlp": _NoFFN, "post_feedforward_layernorm": nn.Identity},
        _GATED,
        "mlp",
    ),
)
_OLMO2 = _Family(
    "layers",
    _SubLayer(
        {"self_attn": _NoAttention, "post_attention_layernorm": nn.Identity},
        _SELF_ATTN,
        "self_attn",
        "they share a norm",
    ),
    _SubLayer({"mlp": _NoFFN, "post_feedforward_layernorm": nn.Identity}, _GATED, "mlp"),
)
_NEOX = _Family(
    "layers",
    _SubLayer(
        {"input_layernorm": nn.Identity, "attention": _NoAttention},
        {"attention.query_key_value": ("out", "heads"), "attention.dense": ("in", "heads")},
        "attention",
    ),
    _SubLayer(_NO_FFN, {"mlp.dense_h_to_4h": ("out", "ffn"), "mlp.dense_4h_to_h": ("in", "ffn")}, "mlp"),
)
_OPT = _Family(
    "decoder.layers",
    _SubLayer(
        {"self_attn_layer_norm": nn.Identity, "self_attn": _NoAttention},
        {
            "self_attn.q_proj": ("out", "heads"),
            "self_attn.k_proj": ("out", "kv"),
            "self_attn.v_proj": ("out", "kv"),
            "self_attn.out_proj": ("in", "heads"),
        },
        "self_attn",
    ),
    _SubLayer(
        {"final_layer_norm": nn.Identity, "fc1": nn.Identity, "fc2": _NoFFN},
        {"fc1": ("out", "ffn"), "fc2": ("in", "ffn")},
        "fc1",
    ),
)
_GPT2 = _Family(
    "h",
    _SubLayer(
        {"ln_1": nn.Identity, "attn": _NoAttention},
        {"attn.c_attn": ("out", "heads"), "attn.c_proj": ("in", "heads")},
        "attn",
    ),
    _SubLayer({"ln_2": nn.Identity, "mlp": _NoFFN}, {"mlp.c_fc": ("out", "ffn"), "mlp.c_proj": ("in", "ffn")}, "mlp"),
)
_BERT = _Family(
    "encoder.layer",
    _SubLayer(
        {"attention": _SameAttention},
        {
            "attention.self.query": ("out", "heads"),
            "attention.self.key": ("out", "heads"),
            "attention.self.value": ("out", "heads"),
            "attention.output.dense": ("in", "heads"),
        },
        "attention.self",
    ),
    _SubLayer(
        {"intermediate": nn.Identity, "output": _SameOutput},
        {"intermediate.dense": ("out", "ffn"), "output.dense": ("in", "ffn")},
        "intermediate",
    ),
)
_VIT = _Family(
    "layers",
    _SubLayer(
        {"layernorm_before": nn.Identity, "attention": _NoAttention},
        {
            "attention.q_proj": ("out", "heads"),
            "attention.k_proj": ("out", "heads"),
            "attention.v_proj": ("out", "heads"),
            "attention.o_proj": ("in", "heads"),
        },
        "attention",
    ),
    _SubLayer(
        {"layernorm_after": nn.Identity, "mlp": _NoFFN}, {"mlp.fc1": ("out", "ffn"), "mlp.fc2": ("in", "ffn")}, "mlp"
    ),
)
_MPNET = _Family(
    "encoder.layer",
    _SubLayer(
        {"attention": _SameAttention},
        {
            "attention.attn.q": ("out", "heads"),
            "attention.attn.k": ("out", "heads"),
            "attention.attn.v": ("out", "heads"),
            "attention.attn.o": ("in", "heads"),
        },
        "attention.attn",
        shared=("attention", "position_bias"),
    ),
    _BERT.ffn,
)
_DISTILBERT = _Family(
    "transformer.layer",
    _SubLayer(
        {"attention": _NoAttention, "sa_layer_norm": nn.Identity},
        {
            "attention.q_lin": ("out", "heads"),
            "attention.k_lin": ("out", "heads"),
            "attention.v_lin": ("out", "heads"),
            "attention.out_lin": ("in", "heads"),
        },
        "attention",
    ),
    _SubLayer(
        {"ffn": _NoFFN, "output_layer_norm": nn.Identity},
        {"ffn.lin1": ("out", "ffn"), "ffn.lin2": ("in", "ffn")},
        "ffn",
    ),
)
_MODERNBERT = _Family(
    "layers",
    _SubLayer(
        {"attn_norm": nn.Identity, "attn": _NoAttention},
        {"attn.Wqkv": ("out", "heads"), "attn.Wo": ("in", "heads")},
        "attn",
    ),
    _SubLayer({"mlp_norm": nn.Identity, "mlp": _NoFFN}, {"mlp.Wi": ("out", "ffn"), "mlp.Wo": ("in", "ffn")}, "mlp"),
)
_DINOV2 = _Family(
    "encoder.layer",
    _SubLayer(
        {"norm1": nn.Identity, "attention": _NoAttention, "layer_scale1": nn.Identity},
        _VIT.attention.linears,
        "attention",
    ),
    _SubLayer({"norm2": nn.Identity, "mlp": _NoFFN, "layer_scale2": nn.Identity}, _VIT.ffn.linears, "mlp"),
)
_SPLIT_ATTENTION = {
    "attention.attention.query": ("out", "heads"),
    "attention.attention.key": ("out", "heads"),
    "attention.attention.value": ("out", "heads"),
    "attention.output.dense": ("in", "heads"),
}
# As transformers before 5.2x has it, in two modules.
_OLDER_DINOV2 = _Family(
    "encoder.layer",
    _SubLayer(
        {"norm1": nn.Identity, "attention": _NoFFN, "layer_scale1": nn.Identity},
        _SPLIT_ATTENTION,
        "attention.attention",
    ),
    _DINOV2.ffn,
)
_VIDEOMAE = _Family(
    "encoder.layer",
    _SubLayer(
        {"layernorm_before": nn.Identity, "attention": _NoFFN},
        _SPLIT_ATTENTION,
        "attention.attention",
    ),
    _SubLayer({"layernorm_after": nn.Identity, **_BERT.ffn.swaps}, _BERT.ffn.linears, "intermediate"),
)
_CLIP = _Family(
    "encoder.layers",
    _SubLayer(
        {"layer_norm1": nn.Identity, "self_attn": _NoAttention},
        {
            "self_attn.q_proj": ("out", "heads"),
            "self_attn.k_proj": ("out", "heads"),
            "self_attn.v_proj": ("out", "heads"),
            "self_attn.out_proj": ("in", "heads"),
        },
        "self_attn",
    ),
    _SubLayer({"layer_norm2": nn.Identity, "mlp": _NoFFN}, _VIT.ffn.linears, "mlp"),
)
_WHISPER_ENCODER = _Family("encoder.layers", _OPT.attention, _OPT.ffn)
_WHISPER_DECODER = _Family(
    "decoder.layers",
    _OPT.attention,
    _OPT.ffn,
    _SubLayer(
        {"encoder_attn_layer_norm": nn.Identity, "encoder_attn": _NoAttention},
        {
            "encoder_attn.q_proj": ("out", "heads"),
            "encoder_attn.k_proj": ("out", "kv"),
            "encoder_attn.v_proj": ("out", "kv"),
            "encoder_attn.out_proj": ("in", "heads"),
        },
        "encoder_attn",
    ),
)


def _t5_attention(place: str, core: str) -> _SubLayer:
    linears = {f"{place}.{core}.{name}": ("out", "heads") for name in "qkv"}
    return _SubLayer(
        {place: _SameT5Attention},
        {**linears, f"{place}.{core}.o": ("in", "heads")},
        f"{place}.{core}",
        shared=(f"{place}.{core}", "position_bias"),
        handed_on=True,
    )


def _t5_ffn(place: str) -> _SubLayer:
    # Plain ones have `wi`, gated ones the other two.
    linears = {f"{place}.DenseReluDense.{name}": ("out", "ffn") for name in ("wi", "wi_0", "wi_1")}
    return _SubLayer(
        {place: nn.Identity},
        {**linears, f"{place}.DenseReluDense.wo": ("in", "ffn")},
        f"{place}.DenseReluDense",
    )


_T5_ENCODER = _Family("encoder.block", _t5_attention("layer.0", "SelfAttention"), _t5_ffn("layer.1"))
_T5_DECODER = _Family(
    "decoder.block", _T5_ENCODER.attention, _t5_ffn("layer.2"), _t5_attention("layer.1", "EncDecAttention")
)
# By the stock class of a block, so that a block alone tells its family.
_FAMILIES = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "SmolLM3DecoderLayer": _LLAMA,
    "Phi3DecoderLayer": _PHI3,
    "Gemma2DecoderLayer": _GEMMA,
    "Gemma3DecoderLayer": _GEMMA,
    "Olmo2DecoderLayer": _OLMO2,
    "MixtralDecoderLayer": _LLAMA,
    "Qwen3MoeDecoderLayer": _LLAMA,
    "Qwen2VLDecoderLayer": _LLAMA,
    "Qwen2_5_VLDecoderLayer": _LLAMA,
    "GPT2Block": _GPT2,
    "GPTNeoXLayer": _NEOX,
    "OPTDecoderLayer": _OPT,
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "XLMRobertaLayer": _BERT,
    "ElectraLayer": _BERT,
    "MPNetLayer": _MPNET,
    "TransformerBlock": _DISTILBERT,
    "ModernBertEncoderLayer": _MODERNBERT,
    "ViTLayer": _VIT,
    "DeiTLayer": _VIT,
    "Dinov2Layer": _DINOV2,
    "VideoMAELayer": _VIDEOMAE,
    "CLIPEncoderLayer": _CLIP,
    "SiglipEncoderLayer": _CLIP,
    "WhisperEncoderLayer": _WHISPER_ENCODER,
    "WhisperDecoderLayer": _WHISPER_DECODER,
    "T5Block": _T5_ENCODER,
    "MT5Block": _T5_ENCODER,
}
# By a class that serves both stacks, the family of those in a decoder.
_DECODERS = {"T5Block": _T5_DECODER, "MT5Block": _T5_DECODER}
# By a class that only the older module of a block's class has.
_OLDER = {"Dinov2SelfAttention": _OLDER_DINOV2}
# Language models inside others come last.
_PLACES = (
    *dict.fromkeys(family.blocks for family in (*_FAMILIES.values(), *_DECODERS.values())),
    "language_model.layers",
    "text_model.layers",
)
_STACKS = ("encoder", "decoder")


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Blocks of a model with one stack of them, with or without a head, stock or heterogeneous.

    Raises:
        ValueError: if the model is of no family known here, or has several stacks.
    """
    stacks = stacks_of(model)
    if "" not in stacks:
        raise ValueError(f"`{type(model).__name__}` has several stacks of blocks: {', '.join(stacks)}")
    return stacks[""]


def stacks_of(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Blocks of a model by the name of their stack, which is "" in a model with one; as for `blocks_of`.

    Raises:
        ValueError: if the model is of no family known here.
    """
    base = getattr(model, "base_model", model)
    found = {place: blocks for place in _PLACES if (blocks := _known_blocks(base, place)) is not None}
    stacks = {stack: blocks for place, blocks in found.items() for stack in _STACKS if place.startswith(f"{stack}.")}
    if len(stacks) == len(_STACKS):
        return {stack: stacks[stack] for stack in _STACKS}
    if not found:
        raise ValueError(f"the blocks of `{type(model).__name__}` are not known")
    return {"": next(iter(found.values()))}


def block_at(model: nn.Module, address: str) -> nn.Module:
    """The block at an address such as `blocks.3` or `decoder.blocks.3`.

    Raises:
        ValueError: as `blocks_of`, or if there is no such block.
    """
    stack, _, rest = address.rpartition("blocks.")
    blocks = stacks_of(model).get(stack.rstrip("."))
    if blocks is None or not rest.isdecimal() or int(rest) >= len(blocks):
        raise ValueError(f"`{type(model).__name__}` has no `{address}`")
    return blocks[int(rest)]


def _known_blocks(base: Any, place: str) -> nn.ModuleList | None:
    for name in place.split("."):
        base = getattr(base, name, None)
    known = isinstance(base, nn.ModuleList) and all(type(block).__name__ in _FAMILIES for block in base)
    return base if known else None


def present(block: nn.Module, kind: str) -> bool:
    """Whether a block has its `attention`, `cross_attention` or `ffn`."""
    swaps = _sublayer(block, kind).swaps
    return any(type(block.get_submodule(name)).__name__ != other.__name__ for name, other in swaps.items())


def has_output_projection(block: nn.Module, kind: str) -> bool:
    """Whether a sub-layer has one output projection; an FFN with experts has one for each of them."""
    return kind != "ffn" or not hasattr(getattr(block, "mlp", None), "experts")


def output_projection(block: nn.Module, kind: str) -> nn.Module:
    """The layer that leads from the heads or neurons of a block's `attention` or `ffn` back to the residual stream.

    Raises:
        ValueError: for an FFN with experts.
    """
    linears = _sublayer(block, kind).linears
    if not has_output_projection(block, kind):
        raise ValueError(
            f"the FFN of a `{type(block).__name__}` with experts has an output projection for each of them"
        )
    return block.get_submodule(next(path for path, (side, _) in linears.items() if side == "in"))


def projections(block: nn.Module, kind: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """The module of a block that a sub-layer's input enters first, and its layers that lead to units or back from them.

    Returns:
        A path, and by path of each layer its side with the units (`out` or `in`) and the unit, as this file has them.
    """
    sublayer = _sublayer(block, kind)
    return sublayer.counts, dict(sublayer.linears)


def skip(block: nn.Module, kind: str) -> None:
    """Makes a sub-layer the identity on the residual stream for good; its parameters are gone, its norm's too.

    Args:
        block: a block of a model.
        kind: `attention`, `cross_attention` or `ffn`.
    """
    bypass(block, kind)


def bypass(block: nn.Module, kind: str) -> Callable[[], None]:
    """Makes a sub-layer the identity on the residual stream, and returns a function that puts everything back.

    Meant for passes without a KV cache: a bypassed attention stores nothing, so block 0 would report an empty cache.

    Args:
        block: a block of a model.
        kind: `attention`, `cross_attention` or `ffn`.
    """
    swaps = _sublayer(block, kind).swaps
    before = {name: block.get_submodule(name) for name in swaps}
    for name, other in swaps.items():
        _put(block, name, other.of(before[name]) if other is _SameT5Attention else other())

    def undo() -> None:
        for name, module in before.items():
            _put(block, name, module)

    return undo


def _put(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)


def _sublayer(block: nn.Module, kind: str) -> _SubLayer:
    family = _FAMILIES.get(type(block).__name__)
    module = sys.modules[type(block).__module__]
    family = next((older for name, older in _OLDER.items() if hasattr(module, name)), family)
    if getattr(block, "is_decoder", False):
        family = _DECODERS.get(type(block).__name__, family)
    found = getattr(family, kind, None) if kind in SKIPS.values() else None
    if found is None:
        raise ValueError(f"`{kind}` of a `{type(block).__name__}` is not known")
    sublayer: _SubLayer = found
    return sublayer


def _apply_plan(model: nn.Module, config: transformers.PreTrainedConfig) -> None:
    """Cuts a freshly built stock model as its configuration says."""
    section = getattr(config, "prunekit", None) or {}
    layers = section.get("per_layer_config") or {}
    if layers and section.get("schema") != SCHEMA:
        raise ValueError(f"`prunekit` of the configuration has schema {section.get('schema')}, known is {SCHEMA}")
    stacks = stacks_of(model)
    config = config if "decoder" in stacks else config.get_text_config()
    for key, layer in layers.items():
        stack, _, number = key.rpartition(".")
        blocks = stacks.get(stack, ())
        numbers = ("kept_heads",) if blocks and _sublayer(blocks[0], "attention").shared else ()
        skipped, wrong = layer.get("skip", ()), set(layer) - {"skip", *WIDTHS, *numbers}
        wrong |= set(skipped) - set(SKIPS)
        if wrong or not 0 <= int(number) < len(blocks):
            raise ValueError(f"`prunekit.per_layer_config.{key}` is not understood: {sorted(wrong) or 'no such block'}")
        block = blocks[int(number)]
        _narrow_heads(block, layer, *_head_counts(config, stack))
        if "cross_attention_heads" in layer:
            _narrow_cross_attention(block, layer["cross_attention_heads"], _head_counts(config, stack)[0])
        if "num_local_experts" in layer or hasattr(getattr(block, "mlp", None), "experts"):
            _narrow_experts(block, layer)
        elif "intermediate_size" in layer:
            _narrow_ffn(block, layer["intermediate_size"])
        for name in skipped:
            skip(block, SKIPS[name])
    for stack, blocks in stacks.items():
        if stack != "encoder":
            _compact_cache(blocks, config, "attention")
    if "decoder" in stacks:
        _compact_cache(stacks["decoder"], config, "cross_attention")


def _head_counts(config: transformers.PreTrainedConfig, stack: str) -> tuple[int, int | None]:
    """Query heads and KV groups of a stack's attention; None where each query head has a key and a value of its own."""
    if stack:
        return getattr(config, f"{stack}_attention_heads", config.num_attention_heads), None
    return config.num_attention_heads, getattr(config, "num_key_value_heads", None)


def _narrow_heads(block: nn.Module, layer: Mapping[str, Any], heads: int, grouped: int | None) -> None:
    """Gives a block's attention its heads; families without KV groups have as many KV heads as query heads."""
    kv = grouped or heads
    new_heads = layer.get("num_attention_heads", heads if grouped else layer.get("num_key_value_heads", heads))
    new_kv = layer.get("num_key_value_heads", kv if grouped else new_heads)
    if not 0 < new_kv <= kv or not 0 < new_heads <= heads or new_heads % new_kv or not (grouped or new_kv == new_heads):
        raise ValueError(f"a block cannot have {new_heads} heads on {new_kv} KV heads, the model has {heads} on {kv}")
    if (new_heads, new_kv) == (heads, kv):
        return
    attention = _sublayer(block, "attention")
    if attention.fixed:
        raise ValueError(f"no head of a `{type(block).__name__}` can go: {attention.fixed}")
    _set_heads(block, attention, (new_heads, heads), (new_kv, kv), layer.get("kept_heads", ()))


def _narrow_cross_attention(block: nn.Module, new: int, heads: int) -> None:
    """Gives a block's cross-attention so many heads."""
    if not 0 < new <= heads:
        raise ValueError(f"a block cannot have {new} heads in its cross-attention, the model has {heads}")
    if new < heads:
        _set_heads(block, _sublayer(block, "cross_attention"), (new, heads), (new, heads), None)


def _set_heads(
    block: nn.Module,
    attention: _SubLayer,
    query: tuple[int, int],
    key: tuple[int, int],
    numbers: Sequence[int] | None,
) -> None:
    """Narrows an attention.

    Args:
        block: a block of a model.
        attention: where it lies.
        query: heads left and heads before.
        key: KV heads left and before.
        numbers: of the heads left, where blocks share something with an entry for each; None where that is of no
            matter.
    """
    (new_heads, heads), (new_kv, kv) = query, key
    qkv = (new_heads + 2 * new_kv, heads + 2 * kv)
    _narrow_linears(block, attention, {"heads": query, "kv": key, "qkv": qkv})
    core: Any = block.get_submodule(attention.counts)
    if "qkv" in (unit for _, unit in attention.linears.values()):
        core.config = _OwnNumbers(core.config, num_attention_heads=new_heads)
    counts = dict.fromkeys(("num_attention_heads", "num_heads", "n_heads"), new_heads) | {"num_key_value_heads": new_kv}
    counts["num_key_value_groups"] = new_heads // new_kv
    for name in ("split_size", "all_head_size", "inner_dim"):
        counts[name] = getattr(core, name, 0) * new_heads // heads
    _set_counts(core, counts)
    if attention.shared:
        place, argument = attention.shared
        if numbers is not None and len(numbers) != new_heads:
            raise ValueError(f"`kept_heads` must name the {new_heads} heads that a block has left, it is {[*numbers]}")
        own = _HandedOn(argument, numbers, core) if attention.handed_on else _OwnHeads(argument, numbers or ())
        module = block.get_submodule(place)
        module.register_forward_pre_hook(own, with_kwargs=True)
        if isinstance(own, _HandedOn):
            module.register_forward_hook(own.hand_on)


class _OwnHeads:
    """Before a forward, leaves of an argument that blocks share [batch, heads, ...] the heads that a block has."""

    def __init__(self, argument: str, numbers: Sequence[int]) -> None:
        self.argument, self.numbers = argument, list(numbers)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, self.argument: kwargs[self.argument][:, self.numbers]}


class _HandedOn:
    """Lets an attention with fewer heads use its part of a bias that blocks hand on, and hands on the whole.

    Args:
        argument: of its forward: the bias [1, heads, queries, keys], or None for the block that makes it.
        numbers: heads that are left; None where the bias is zero, and an attention makes its own.
        core: the attention.
    """

    def __init__(self, argument: str, numbers: Sequence[int] | None, core: Any) -> None:
        self.argument, self.numbers = argument, None if numbers is None else list(numbers)
        self.whole: Tensor | None = None
        self.stock_bias = core.compute_bias
        core.compute_bias = self.bias

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.whole = kwargs.get(self.argument)
        own = None if self.whole is None or self.numbers is None else self.whole[:, self.numbers]
        return args, {**kwargs, self.argument: own}

    def bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """The part of the bias that it makes."""
        self.whole = whole = self.stock_bias(*args, **kwargs)
        return whole[:, self.numbers]

    def hand_on(self, module: nn.Module, args: Any, output: Any) -> tuple[Any, ...]:
        """The attention's outputs with the whole bias."""
        whole, self.whole = self.whole, None
        return (output[0], whole, *output[2:])


def _narrow_ffn(block: nn.Module, new: int) -> None:
    """Gives a block's FFN so many neurons."""
    ffn = _sublayer(block, "ffn")
    last = block.get_submodule(list(ffn.linears)[-1])
    neurons = last.weight.shape[_dim(last, "in")]
    if not 0 < new <= neurons:
        raise ValueError(f"a block cannot have {new} neurons, the model has {neurons}")
    _narrow_linears(block, ffn, {"ffn": (new, neurons)})
    _set_counts(block.get_submodule(ffn.counts), {"intermediate_size": new})


def _narrow_experts(block: nn.Module, layer: Mapping[str, Any]) -> None:
    """Gives a block so many experts, of so many neurons each; transformers keeps them in one tensor."""
    mlp: Any = getattr(block, "mlp", None)
    if not hasattr(mlp, "experts"):
        raise ValueError(f"a `{type(block).__name__}` without experts cannot have {layer['num_local_experts']}")
    experts, router = mlp.experts, mlp.gate
    count, old = layer.get("num_local_experts", experts.num_experts), experts.num_experts
    new, neurons = layer.get("intermediate_size", experts.intermediate_dim), experts.intermediate_dim
    if not router.top_k <= count <= old or not 0 < new <= neurons:
        raise ValueError(f"a block cannot have {count} experts of {new} neurons, the model has {old} of {neurons}")
    if (count, new) == (old, neurons):
        return
    shapes = {"gate_up_proj": (count, 2 * new), "down_proj": (count, experts.hidden_dim, new)}
    for name, shape in shapes.items():
        weight = getattr(experts, name).detach()[tuple(slice(size) for size in shape)]
        setattr(experts, name, nn.Parameter(weight.clone()))
    router.weight = nn.Parameter(router.weight.detach()[:count].clone())
    router.num_experts = experts.num_experts = count
    experts.intermediate_dim = new


def _narrow_linears(block: nn.Module, sublayer: _SubLayer, counts: Mapping[str, tuple[int, int]]) -> None:
    """Shortens weights in place, so that dtype, device and bias stay; `counts` are units left and units before."""
    there = {name for name, _ in block.named_modules()}
    for path, (side, unit) in sublayer.linears.items():
        if path not in there:
            continue
        layer, (new, old) = block.get_submodule(path), counts[unit]
        dim = _dim(layer, side)
        size = layer.weight.shape[dim] * new // old
        layer.weight = nn.Parameter(layer.weight.detach().narrow(dim, 0, size).clone())
        if side == "out" and layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach().narrow(0, 0, size).clone())
        setattr(layer, _SIDES[side][isinstance(layer, Conv1D)], size)


# Layers outside blocks that lead from the residual stream to another of its width.
_SQUARE = ("pooler.dense", "transform.dense", "lm_head.dense", "classifier.dense")


def _narrow_hidden(model: nn.Module, base: nn.Module | None, built: int, new: int) -> None:
    """Gives a freshly built model a residual stream of so many channels; heads keep their number and width.

    Args:
        model: all of it.
        base: where its blocks are; None where they are narrow already.
        built: channels that the stock constructor gave it; what has others is narrow already.
        new: channels left.
    """
    if not 0 < new <= built:
        raise ValueError(f"a residual stream cannot have {new} channels, the model was built with {built}")
    inside: set[nn.Module] = set()
    for block in blocks_of(base) if base is not None else ():
        inside.update(block.modules())
        for kind in ("attention", "ffn"):
            for path, (side, _) in _sublayer(block, kind).linears.items():
                _narrow_side(block.get_submodule(path), "in" if side == "out" else "out", new)
        for module in block.modules():
            _narrow_norm(module, built, new)
    for name, module in model.named_modules():
        if module not in inside and not any(part.isdecimal() for part in name.split(".")):
            _narrow_outer(name, module, built, new)


def _narrow_outer(name: str, module: nn.Module, built: int, new: int) -> None:
    _narrow_norm(module, built, new)
    if isinstance(module, nn.Embedding) and module.embedding_dim == built:
        module.weight = nn.Parameter(module.weight.detach()[:, :new].clone())
        module.embedding_dim = new
    elif isinstance(module, nn.Conv2d) and module.out_channels == built:
        _narrow_side(module, "out", new)
        module.out_channels = new
    elif isinstance(module, nn.Linear) and module.in_features == built:
        _narrow_side(module, "in", new)
        if name.endswith(_SQUARE):
            _narrow_side(module, "out", new)
    for own, parameter in list(module.named_parameters(recurse=False)):
        if parameter.dim() == 3 and parameter.shape[-1] == built:
            setattr(module, own, nn.Parameter(parameter.detach()[..., :new].clone()))


def _narrow_norm(module: nn.Module, built: int, new: int) -> None:
    if isinstance(module, nn.LayerNorm) and module.normalized_shape == (built,):
        module.weight = nn.Parameter(module.weight.detach()[:new].clone())
        module.bias = nn.Parameter(module.bias.detach()[:new].clone())
        module.normalized_shape = (new,)


def _narrow_side(layer: nn.Module, side: str, new: int) -> None:
    """Shortens one side of a layer to its first so many."""
    layer.weight = nn.Parameter(layer.weight.detach().narrow(_dim(layer, side), 0, new).clone())
    if side == "out" and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[:new].clone())
    setattr(layer, _SIDES[side][isinstance(layer, Conv1D)], new)


def _dim(layer: nn.Module, side: str) -> int:
    """Dimension of a weight: Linear stores [out, in], Conv1D [in, out]."""
    return int((side == "in") != isinstance(layer, Conv1D))


def _set_counts(module: nn.Module, counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        if hasattr(module, name):
            setattr(module, name, count)


def _compact_cache(blocks: nn.ModuleList, config: transformers.PreTrainedConfig, kind: str) -> None:
    """Lets the attention of a kind that is left fill the KV cache from its first layer on.

    transformers asks the first layer of a cache (and the first one of each layer type) how many tokens it holds; one
    that belongs to a removed attention holds none, and positions and masks would be those of an empty cache. Where no
    attention is left at all nothing counts tokens: `generate` passes positions on, other callers of GPT-2 have to.
    """
    kept = [present(block, kind) for block in blocks]
    if all(kept) or not any(kept) or not hasattr(config, "use_cache"):
        return
    listed = getattr(config, "layer_types", None)
    types, slots = cache_slots(listed or [""] * len(blocks), kept)
    if listed:
        config.layer_types = types
    for block, slot in zip(blocks, slots, strict=True):
        if slot is not None:
            core = block.get_submodule(_sublayer(block, kind).counts)
            if hasattr(core, "layer_idx"):
                core.layer_idx = slot


def cache_slots(types: Sequence[str], kept: Sequence[bool]) -> tuple[list[str], list[int | None]]:
    """Layer types and the cache layer of each block, None where its attention is gone.

    A block without attention takes the type of the next attention (at the end: of the last), as masks do not matter to
    it. Every attention then takes the first cache layer of its type behind its predecessor's, which gives the first
    layer of the cache, and the first one of each type, to an attention. types `F F S F`, kept `F - - F` of blocks 0 and
    3: types `F F F F`, layers 0 and 1.

    Args:
        types: layer type of each block.
        kept: whether a block has attention; at least one has.
    """
    last = max(i for i, is_kept in enumerate(kept) if is_kept)
    relabelled = [types[next((j for j in range(i, len(types)) if kept[j]), last)] for i in range(len(types))]
    slots: list[int | None] = []
    free = 0
    for kind, is_kept in zip(relabelled, kept, strict=True):
        slots.append(relabelled.index(kind, free) if is_kept else None)
        free = slots[-1] + 1 if slots[-1] is not None else free
    return relabelled, slots


class _Pruned:
    """Comes before a stock class: cuts what the stock constructor built, on the meta device too."""

    def __init__(self, config: transformers.PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        section = getattr(config, "prunekit", None) or {}
        built = section.get("built_hidden_size")
        if built is not None:
            # The stock constructor derives the width of heads from it.
            config.hidden_size = built
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        base = self.base_model  # type: ignore[attr-defined]
        # Some heads build their base model by its class, which has cut itself then.
        whole = base is self or not isinstance(base, _Pruned)
        if built is not None:
            _narrow_hidden(self, base if whole else None, built, section["hidden_size"])
            config.hidden_size = section["hidden_size"]
            self.tie_weights()  # type: ignore[attr-defined]
        if whole:
            _apply_plan(base, self.config)  # type: ignore[attr-defined]

    # transformers looks for these in the text of the file that a class is from, which here is not the stock one.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(cls.__bases__[-1]._can_set_attn_implementation())  # type: ignore[attr-defined]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(cls.__bases__[-1]._can_set_experts_implementation())  # type: ignore[attr-defined]


class _PromptAsGiven:
    """Comes before Whisper: transformers knows by the model type that its prompts begin as they should."""

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_input_name: str, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        if model_kwargs.get("decoder_input_ids") is not None:
            return model_kwargs.pop("decoder_input_ids"), model_kwargs
        prepare: Any = super()._prepare_decoder_input_ids_for_generation  # type: ignore[misc]
        made: tuple[Tensor, dict[str, Any]] = prepare(batch_size, model_input_name, model_kwargs, *args, **kwargs)
        return made


# By stock model type: what comes before its classes besides.
_BEFORE: dict[str, tuple[type, ...]] = {"whisper": (_PromptAsGiven,)}


def __getattr__(name: str) -> Any:
    """Heterogeneous class of that name; with the first one of a family all of the family's are made."""
    for model_type in CLASSES:
        if name in class_names(model_type):
            _make_classes(model_type)
            return globals()[name]
    raise AttributeError(f"module `{__name__}` has no `{name}`")


def class_names(model_type: str) -> tuple[str, ...]:
    """Heterogeneous classes of a stock model type: configuration, base model, heads."""
    prefix, *rest = CLASSES[model_type].split()
    return tuple(f"Prunekit{prefix}{part}" for part in rest)


def _make_classes(model_type: str) -> None:
    """Puts a family's classes into this module and tells transformers of them.

    It has to know which class belongs to which configuration, and how older checkpoints name the tensors of each.
    """
    config_name, *names = class_names(model_type)
    stock_config = getattr(transformers, config_name.removeprefix("Prunekit"))
    config = _make(config_name, (stock_config,), {"model_type": f"prunekit_{model_type}", "_auto_class": "AutoConfig"})
    for name in names:
        stock, auto = getattr(transformers, name.removeprefix("Prunekit")), auto_class(name)
        cls = _make(name, (*_BEFORE.get(model_type, ()), _Pruned, stock), {"config_class": config, "_auto_class": auto})
        getattr(transformers, auto).register(config, cls, exist_ok=True)
        _rename(stock.__name__, name)
    _rename(model_type, config.model_type)


def _rename(stock: str, own: str) -> None:
    """What transformers does to tensors of a stock class or model type while loading, for ours too."""
    renaming = get_checkpoint_conversion_mapping(stock)
    if renaming is not None:
        register_checkpoint_conversion_mapping(own, renaming, overwrite=True)


def _make(name: str, bases: tuple[type, ...], members: Mapping[str, Any]) -> Any:
    doc = f"`{bases[-1].__name__}` of a model whose blocks differ."
    made = globals()[name] = type(name, bases, {"__module__": __name__, "__doc__": doc, **members})
    return made


def auto_class(name: str) -> str:
    """Auto class of transformers that a model class belongs to; `LlamaForCausalLM` gives `AutoModelForCausalLM`."""
    if name.removeprefix("Prunekit") in AUTO_CLASSES:
        return AUTO_CLASSES[name.removeprefix("Prunekit")]
    head = re.search(r"For[A-Z]\w*$", name)
    if head:
        return f"AutoModel{head.group().replace('ForConditionalGeneration', 'ForImageTextToText')}"
    return "AutoModelForCausalLM" if name.endswith("LMHeadModel") else "AutoModel"
