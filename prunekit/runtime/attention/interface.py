"""The attention function and the mask function that transformers calls for `attn_implementation="prunekit"`.

Prompts go to block-sparse prefill. Steps that read a cache, and masks that are more than causality and padding, go to
scaled dot-product attention under a dense mask: right, but no faster than dense attention.

Shapes: B batch, H query heads, G key-value heads, Q queries, T keys, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from prunekit.core.errors import RuntimePolicyError
from prunekit.runtime.attention.patterns._engine import Pattern, block_lists
from prunekit.runtime.attention.policy import policy_of
from prunekit_kernels.block_sparse_prefill import BlockLists, block_sparse_prefill

NAME = "prunekit"


def register() -> None:
    """Makes `attn_implementation="prunekit"` known to transformers, for this process."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


@functools.lru_cache(maxsize=16)
def _lists(pattern: Pattern, n_queries: int, n_keys: int, device: str) -> BlockLists:
    return block_lists(pattern, n_queries, n_keys, n_keys - n_queries, device=device)


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None, **options: Any,
) -> Tensor | None:  # fmt: skip
    """What the attention function needs to know about causality and padding.

    Returns:
        None for a plain causal or plain bidirectional batch without padding; bool [B, T] for one with padding on the
        left or right; bool [B, 1, Q, T] for everything else.
    Raises:
        RuntimePolicyError: if a batch padded on the left comes under a mask that is neither.
    """
    padding = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if padding is not None and padding.shape[1] == kv_length and bool(padding.all()):
        padding = None
    plain = mask_function in (causal_mask_function, bidirectional_mask_function) and kv_offset == 0
    plain = plain and isinstance(q_offset, int) and q_offset + q_length == kv_length
    if plain and (padding is None or (padding.shape[1] == kv_length and _in_one_piece(padding))):
        return padding
    if padding is not None and not bool(padding[:, 0].all()):
        raise RuntimePolicyError(
            "a batch padded on the left comes with a mask that is more than causality and padding",
            why="a pattern counts from the first token of a prompt, which such a mask does not tell",
            hint="pad on the right, run one prompt at a time, or use a dynamic cache",
        )
    options = {**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, **options,
    )  # fmt: skip


def _in_one_piece(padding: Tensor) -> bool:
    """Whether the tokens of every sequence lie side by side."""
    starts, ends = _spans(padding)
    return bool(((ends - starts) == padding.sum(1)).all())


def _spans(padding: Tensor) -> tuple[Tensor, Tensor]:
    """First token of each sequence and one past its last, int32 [B]."""
    marks = padding.to(torch.int32)
    starts = marks.argmax(1)
    ends = padding.shape[1] - marks.flip(1).argmax(1)
    return starts.to(torch.int32), ends.to(torch.int32)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in which each query reads the keys that the pattern in the module's config allows.

    Args:
        query: [B, H, Q, D].
        key: [B, G, T, D]; `value` alike.
        attention_mask: from `attention_mask` above, or a prepared [B, 1, Q, T], bool or additive.
    Returns:
        [B, Q, H, D], and None for the weights.
    Raises:
        RuntimePolicyError: if the pattern and the module disagree on causality, or dropout is asked for.
    """
    policy = policy_of(module.config)
    pattern = policy.pattern
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True)) if causal is None else bool(causal)
    n_queries, n_keys = query.shape[2], key.shape[2]
    if not policy.covers(getattr(module, "layer_idx", None)):
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = _dense(None, attention_mask, n_queries, n_keys, causal, query.device)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    _check(pattern, causal, dropout)
    if attention_mask is None and n_queries > 1:
        lists = _lists(pattern, n_queries, n_keys, str(query.device))
        out, _ = block_sparse_prefill(query, key, value, lists, scale=scaling)
    elif attention_mask is not None and attention_mask.dim() == 2 and n_queries == n_keys:
        lists = _lists(pattern, n_queries, n_keys, str(query.device))
        starts, ends = _spans(attention_mask)
        out, _ = block_sparse_prefill(query, key, value, lists, scale=scaling, starts=starts, ends=ends)
    else:
        mask = _dense(pattern, attention_mask, n_queries, n_keys, causal, query.device)
        group = query.shape[1] // key.shape[1]
        out = nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), mask, scale=scaling
        )
    return out.transpose(1, 2).contiguous(), None


def _check(pattern: Pattern, causal: bool, dropout: float) -> None:
    if pattern.causal != causal:
        kinds = ("bidirectional", "causal")
        raise RuntimePolicyError(
            f"a {kinds[pattern.causal]} pattern on a {kinds[causal]} attention layer",
            hint="set the pattern's `causal` option to what the model is, or choose a pattern that has one",
        )
    if dropout:
        raise RuntimePolicyError(
            f"`attention_dropout: {dropout}` does not go with a sparse pattern", hint="put the model in eval mode"
        )


def _dense(
    pattern: Pattern | None, given: Tensor | None, n_queries: int, n_keys: int, causal: bool, device: torch.device
) -> Tensor:
    """Mask [B or 1, 1, Q, T] of the pattern (None: every key) together with the one that the model gave.

    Positions count from the first token of each sequence when padding is given as [B, T]. A query without any key,
    which is one of padding, reads its own slot, so that its softmax stays finite.
    """
    k = torch.arange(n_keys, device=device)[None, None, :]
    q = torch.arange(n_keys - n_queries, n_keys, device=device)[None, :, None]
    if given is not None and given.dim() == 2:
        start = _spans(given)[0][:, None, None]
        valid = given[:, None, :n_keys] & (q >= start)
        seen = pattern.allows(q - start, k - start) & valid if pattern else ((k <= q) | (not causal)) & valid
        return (seen | ((k == q) & ~seen.any(-1, keepdim=True)))[:, None]
    seen = (pattern.allows(q, k) if pattern else (k <= q) | (not causal))[:, None]
    if given is None:
        return seen
    given = given[..., :n_keys]
    return given & seen if given.dtype == torch.bool else given.masked_fill(~seen, torch.finfo(given.dtype).min)
