"""The attention function and the mask function that transformers calls for `attn_implementation="prunekit"`.

Prompts go to block-sparse prefill, steps of one token to sparse decode. Several tokens over a padded cache, and masks
that are more than causality and padding, go to scaled dot-product attention under a dense mask: right, but no faster
than dense attention.

Shapes: B batch, H query heads, G key-value heads, Q queries, T keys, D head size.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from prunekit.core.errors import RuntimePolicyError
from prunekit.runtime.attention.decode import cannot_ask, fixed_step, spans_of, step
from prunekit.runtime.attention.kept import prompt_seen
from prunekit.runtime.attention.patterns._engine import Pattern, block_lists, order_of
from prunekit.runtime.attention.patterns._scored import Scored, is_scored
from prunekit.runtime.attention.patterns.dense import Dense
from prunekit.runtime.attention.policy import Policy, policy_at, policy_number, refuse_additions
from prunekit_kernels.block_sparse_prefill import BlockLists, block_sparse_prefill, refusal
from prunekit_kernels.block_sparse_prefill.fastest import prefill_fastest
from prunekit_kernels.permute import permute_tokens

NAME = "prunekit"
# Reasons for running without a kernel that were said in this process.
_SAID: set[str] = set()


def register() -> None:
    """Makes `attn_implementation="prunekit"` known to transformers, for this process."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def say_plain(reason: str, device: torch.device, stacklevel: int = 2) -> None:
    """Warns that attention runs without a kernel; a layer that meets the same reason later says nothing."""
    _SAID.add(reason)
    how = "" if device.type == "cpu" else ", which is right but slow"
    warnings.warn(f"sparse attention runs in plain torch{how}: {reason}", stacklevel=stacklevel + 1)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _lists(pattern: Pattern, n_queries: int, n_keys: int, device: str) -> BlockLists:
    return block_lists(pattern, n_queries, n_keys, n_keys - n_queries, device=device)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _orders(pattern: Pattern, n_tokens: int, device: str) -> tuple[Tensor, Tensor] | None:
    """Token in each slot and slot of each token, int32 [T], or None if slots and positions are the same."""
    order = order_of(pattern, n_tokens)
    return None if order is None else (order.to(device, torch.int32), order.argsort().to(device, torch.int32))


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None, **options: Any,
) -> Tensor | None:  # fmt: skip
    """What the attention function needs to know about causality and padding.

    Returns:
        None for a plain causal or plain bidirectional batch without padding that fills the keys; bool [B, n] for one
        with padding on the left or right, uint8 [B, n] for one without, where only the first n slots of a cache of
        fixed size are filled; int32 [B, 1, 1, 1] for a step of one token over such a cache, how many slots are filled;
        bool [B, T] for such a step with padding; bool [B, 1, Q, O + T] for everything else, O being how many tokens a
        sliding cache no longer holds.
    Raises:
        RuntimePolicyError: if a batch padded on the left comes under a mask that is neither.
    """
    padding = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    plain = mask_function in (causal_mask_function, bidirectional_mask_function) and kv_offset == 0
    one = isinstance(q_offset, Tensor) and q_length == 1 and mask_function is causal_mask_function
    if plain and one and padding is None:
        return _filled_slots(q_offset, batch_size)
    if plain and isinstance(q_offset, Tensor) and cannot_ask(q_offset):
        if one and padding is not None:
            rows = (torch.arange(kv_length, device=q_offset.device) <= q_offset).expand(batch_size, -1)
            return rows & pad(padding, (0, kv_length - padding.shape[1]))
    elif plain:
        filled = int(q_offset) + q_length
        plain = filled == kv_length or (filled < kv_length and mask_function is causal_mask_function)
        padding = padding if padding is None else padding[:, :filled]
        if padding is not None and padding.shape[1] == filled and bool(padding.all()):
            padding = None
            if one:
                return _filled_slots(q_offset, batch_size)
        if plain and padding is None:
            device = options.get("device", "cpu")
            return None if filled == kv_length else torch.ones(batch_size, filled, dtype=torch.uint8, device=device)
        if plain and padding is not None and padding.shape[1] == filled and _in_one_piece(padding):
            # Of one width in all steps: `generate` hands it to a compiled model, which has a graph for each width.
            return pad(padding, (0, kv_length - filled)) if one else padding
    if padding is not None and not bool(padding[:, 0].all()):
        raise RuntimePolicyError(
            "a batch padded on the left comes with a mask that is more than causality and padding",
            why="a pattern counts from the first token of a prompt, which such a mask does not tell",
            hint="pad on the right, run one prompt at a time, or use a dynamic cache",
        )
    options = {**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, **options,
    )  # fmt: skip
    return pad(mask, (kv_offset, 0), value=False) if kv_offset else mask


def _filled_slots(q_offset: Tensor, batch_size: int) -> Tensor:
    """How many slots of a cache of fixed size are filled in a step of one token, int32 [B, 1, 1, 1].

    Four dimensions, because transformers takes such a mask as it is where `generate` hands it to a compiled model.
    """
    return (q_offset + 1).to(torch.int32).reshape(1, 1, 1, 1).repeat(batch_size, 1, 1, 1)


def _in_one_piece(padding: Tensor) -> bool:
    """Whether the tokens of every sequence lie side by side."""
    starts, ends = spans_of(padding)
    return bool(((ends - starts) == padding.sum(1)).all())


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in which each query reads the keys that the pattern in the module's config allows.

    Args:
        query: [B, H, Q, D].
        key: [B, G, T, D]; `value` alike.
        attention_mask: from `attention_mask` above, or a prepared [B, 1, Q, T], bool or additive.
        options: what else transformers hands over; `position_ids`, [B, Q], tell several texts in one row.
    Returns:
        [B, Q, H, D], and None for the weights.
    Raises:
        RuntimePolicyError: if the pattern is for another model or shorter sequences, if pattern and module disagree on
            causality, if dropout is asked for, or if the module adds to attention what a pattern would leave out.
    """
    number = policy_number(module.config)
    policy = policy_at(number)
    refuse_additions(options)
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True)) if causal is None else bool(causal)
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.dtype == torch.int32:
        filled = _asked(policy, attention_mask, key)
        if filled is None:
            _require_like(policy.pattern, causal, dropout)
            out = _fixed(policy, number, module, query, key, value, attention_mask, scaling)
            return out.transpose(1, 2).contiguous(), None
        key, value, attention_mask = key[:, :, :filled], value[:, :, :filled], None
    cache = key
    key, value, attention_mask, gone = _held(key, value, attention_mask)
    if not policy.covers(getattr(module, "layer_idx", None)):
        mask = _dense_layer_mask(attention_mask, query, key, causal)
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)
    pattern = policy.pattern
    _require_like(pattern, causal, dropout)
    _require_one_size(query, value)
    n_queries, n_keys = query.shape[2], key.shape[2]
    if is_scored(pattern) and n_queries > 1 and not torch.compiler.is_compiling():
        # Steps over a padded cache keep no summaries.
        fixed = n_keys < cache.shape[2] and attention_mask is None and not cannot_ask(query)
        prompt_seen(pattern, module, cache, fixed)
    if not cannot_ask(query):
        # A compiled step sees all slots of its cache, not how many are filled.
        wide = policy.length_tokens is not None and attention_mask is not None and attention_mask.dim() == 2
        policy.require_length(int(spans_of(attention_mask)[1].max()) if wide else gone + n_keys)
    _say_if_plain(query, key)
    if attention_mask is not None and not is_scored(pattern) and order_of(pattern, n_keys) is not None:
        raise RuntimePolicyError("a pattern on a grid does not go with padding or a mask", hint="run without either")
    rows = False if gone else _step_mask(attention_mask, n_queries, n_keys, causal)
    if n_queries == 1 < n_keys and causal and rows is not False:
        from_first = attention_mask is None or attention_mask.dim() == 2
        out = step(pattern, module, query, key, value, rows, scaling, from_first=from_first)
    elif attention_mask is None or (attention_mask.dim() == 2 and n_queries == n_keys):
        out = prompt(pattern, query, key, value, attention_mask, scaling, policy.fastest)
    else:
        if n_queries == n_keys and not cannot_ask(query):
            _require_one_text(pattern, options.get("position_ids"), attention_mask)
        out = _masked(pattern, query, key, value, attention_mask, causal, scaling, gone)
    return out.transpose(1, 2).contiguous(), None


def _held(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Keys and values of the slots that are filled, what of the mask is for them, and the position of the first.

    That position is above 0 where a sliding cache no longer holds the tokens before it.
    """
    if mask is not None and mask.dim() == 2:
        filled = mask.shape[1]
        return key[:, :, :filled], value[:, :, :filled], None if mask.dtype == torch.uint8 else mask, 0
    if mask is not None and mask.dim() == 4 and mask.dtype == torch.bool:
        gone = max(0, mask.shape[3] - key.shape[2])
        return key, value, mask[..., gone:], gone
    return key, value, mask, 0


def _dense_layer_mask(given: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """The mask of a layer that the pattern is not for, as torch's attention takes it."""
    # Torch's own causal mask starts at the first key, not where a prompt goes on over a cache.
    goes_on = given is None and causal and 1 < query.shape[2] < key.shape[2]
    if goes_on or (given is not None and given.dim() == 2):
        return _dense(None, given, query.shape[2], key.shape[2], causal, query.device)
    return given


def _asked(policy: Policy, filled: Tensor, key: Tensor) -> int | None:
    """How many slots of a cache of fixed size are filled, where a pattern on a grid has to know.

    Raises:
        RuntimePolicyError: for a sequence that is too long, or a pattern on a grid in a compiled or captured step.
    """
    grid = hasattr(policy.pattern, "order")
    if cannot_ask(key):
        if grid:
            raise RuntimePolicyError(
                "a pattern on a grid does not go with a compiled or captured step over a static cache",
                why="how many of its slots are filled is not known while the step is made",
                hint="run the step eagerly, or use a dynamic cache",
            )
        return None
    if not grid and policy.length_tokens is None:
        return None
    n_filled = int(filled.max())
    policy.require_length(n_filled)
    return n_filled if grid else None


def _fixed(
    policy: Policy, number: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, filled: Tensor,
    scaling: float | None,
) -> Tensor:  # fmt: skip
    """One step over a cache of fixed size; the decode kernel serves dense layers too, and better than a mask would."""
    _require_one_size(query, value)
    _say_if_plain(query, key)
    pattern = policy.pattern if policy.covers(getattr(module, "layer_idx", None)) else Dense()
    return fixed_step(pattern, number, module, query, key, value, filled, scaling)


def _require_one_size(query: Tensor, value: Tensor) -> None:
    """Refuses values of other channels than the queries have."""
    if value.shape[3] != query.shape[3]:
        raise RuntimePolicyError(
            f"values of {value.shape[3]} channels beside queries of {query.shape[3]}",
            why="the kernels and their references take heads of one size",
            hint="run the model without a pattern",
        )


def _say_if_plain(query: Tensor, key: Tensor) -> None:
    """Says once for each reason that no kernel serves the tensors."""
    if not torch.compiler.is_compiling() and (reason := refusal(query, key)) and reason not in _SAID:
        say_plain(reason, query.device)


def _step_mask(given: Tensor | None, n_queries: int, n_keys: int, causal: bool) -> Tensor | Literal[False] | None:
    """The mask of one step as bool [B or 1, T], None where there is none, False where a row does not say it all."""
    if given is None or n_queries > 1 or not causal:
        return None
    if given.dim() == 2:
        return given
    # Masks that differ between heads, or that add something other than nothing and minus infinity.
    if given.dim() != 4 or given.shape[1] != 1 or given.dtype != torch.bool:
        return False
    return given[:, 0, 0, :n_keys]


def prompt(
    pattern: Pattern | Scored, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, scaling: float | None,
    fastest: bool = False,
) -> Tensor:  # fmt: skip
    """Block-sparse prefill of [B, H, Q, D], scored patterns one sequence at a time."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    spans = None if padding is None else spans_of(padding)
    if not is_scored(pattern):
        lists = _lists(pattern, n_queries, n_keys, str(query.device))
        orders = _orders(pattern, n_keys, str(query.device))
        if orders is None:
            if fastest and spans is None:
                return prefill_fastest(query, key, value, lists, scale=scaling)
            starts, ends = spans or (None, None)
            return block_sparse_prefill(query, key, value, lists, scale=scaling, starts=starts, ends=ends)[0]
        order, slots = orders
        q, k, v = (permute_tokens(t, order, slots) for t in (query, key, value))
        return permute_tokens(block_sparse_prefill(q, k, v, lists, scale=scaling)[0], slots, order)
    out = torch.zeros_like(query)
    pieces = [(0, n_queries)] * len(out) if spans is None else list(zip(*(s.tolist() for s in spans), strict=True))
    for b, (start, end) in enumerate(pieces):
        at = slice(start, end)
        q = query[b : b + 1, :, at]
        k, v = (t[b : b + 1, :, at] if spans else t[b : b + 1] for t in (key, value))
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        chosen = pattern.prompt_lists(q, k, scale) or _lists(Dense(), q.shape[2], k.shape[2], str(q.device))
        out[b : b + 1, :, at] = block_sparse_prefill(q, k, v, chosen, scale=scaling)[0]
    return out


def _require_one_text(pattern: Pattern | Scored, positions: Tensor | None, given: Tensor | None) -> None:
    """Refuses several texts in one row, each of which the pattern would have to count from its own start.

    Args:
        pattern: what counts.
        positions: as the model numbers the tokens, [B, Q].
        given: the model's mask, [B, 1, Q, Q]; a token that no query reads is padding.
    """
    if positions is None or positions.dim() != 2 or given is None or isinstance(pattern, Dense):
        return
    read = (given if given.dtype == torch.bool else given >= 0)[:, 0].any(1)
    if bool(((positions.diff(dim=1) <= 0) & read[:, 1:]).any()):
        raise RuntimePolicyError(
            "several texts lie in one row under a mask that is more than causality and padding",
            why="a pattern counts from the first token of a text, which such a mask does not tell",
            hint="give each text a row of its own, padded on the right",
        )


def _masked(
    pattern: Pattern | Scored, query: Tensor, key: Tensor, value: Tensor, given: Tensor | None, causal: bool,
    scaling: float | None, gone: int = 0,
) -> Tensor:  # fmt: skip
    """Scaled dot-product attention under the pattern and the mask that the model gave, as one dense mask.

    The first key is that of position `gone`.

    Raises:
        RuntimePolicyError: for a pattern that scores, which such a mask leaves nothing to count from.
    """
    if is_scored(pattern):
        raise RuntimePolicyError(
            "a pattern that chooses blocks by score meets a mask that is more than causality and padding",
            why="it scores whole prompts and single steps",
            hint="run one prompt at a time, or choose a pattern that goes by position",
        )
    mask = _dense(pattern, given, query.shape[2], key.shape[2], causal, query.device, gone)
    group = query.shape[1] // key.shape[1]
    return nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), mask, scale=scaling
    )


def _require_like(pattern: Pattern | Scored, causal: bool, dropout: float) -> None:
    """Refuses a layer that differs from the pattern in causality, and dropout."""
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
    pattern: Pattern | None, given: Tensor | None, n_queries: int, n_keys: int, causal: bool, device: torch.device,
    gone: int = 0,
) -> Tensor:  # fmt: skip
    """Mask [B or 1, 1, Q, T] of the pattern (None: every key) together with the one that the model gave.

    Positions count from the first token of each sequence when padding is given as [B, T]. A query without any key,
    which is one of padding, reads its own slot, so that its softmax stays finite.
    """
    k = torch.arange(n_keys, device=device)[None, None, :]
    q = torch.arange(n_keys - n_queries, n_keys, device=device)[None, :, None]
    if given is not None and given.dim() == 2:
        start = spans_of(given)[0][:, None, None]
        valid = given[:, None, :n_keys] & (q >= start)
        seen = pattern.allows(q - start, k - start) & valid if pattern else ((k <= q) | (not causal)) & valid
        return (seen | ((k == q) & ~seen.any(-1, keepdim=True)))[:, None]
    if given is None:
        return (pattern.allows(q, k) if pattern else (k <= q) | (not causal))[:, None]
    given = given[..., :n_keys]
    if causal:
        # The last key that a causal mask shows is the query's own; slots past it may be a cache not yet filled.
        shown = given if given.dtype == torch.bool else given >= 0
        q = (n_keys - 1 - shown.flip(-1).int().argmax(-1, keepdim=True))[:, 0]
    seen = (pattern.allows(gone + q, gone + k) if pattern else (k <= q) | (not causal))[:, None]
    return given & seen if given.dtype == torch.bool else given.masked_fill(~seen, torch.finfo(given.dtype).min)
