"""The attention function that transformers calls for `attn_implementation="prunekit"`.

Prompts go to block-sparse prefill, steps of one token to sparse decode. Several tokens over a padded cache, and masks
that are more than causality and padding, go to scaled dot-product attention under a dense mask: right, but no faster
than dense attention.

Shapes: B batch, H query heads, G key-value heads, Q queries, T keys, D head size.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prunekit.core.errors import RuntimePolicyError
from prunekit.runtime.attention.decode import cannot_ask, fixed_step, spans_of, step
from prunekit.runtime.attention.kept import prompt_seen
from prunekit.runtime.attention.masks import attention_mask, dense_mask_of
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


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in which each query reads the keys that the pattern in the module's config allows.

    Args:
        query: [B, H, Q, D].
        key: [B, G, T, D]; `value` alike.
        attention_mask: from `masks.attention_mask`, or a prepared [B, 1, Q, T], bool or additive, under which positions
            count from the first key.
        options: what else transformers hands over; `position_ids`, [B, Q], tell several texts in one row.
    Returns:
        [B, Q, H, D], and None for the weights.
    Raises:
        RuntimePolicyError: if the pattern is for another model or shorter sequences, if pattern and module disagree on
            causality or the module does not tell, if keys are not those of the queries' own tokens, if dropout is asked
            for, or if the module adds to attention what a pattern would leave out.
    """
    number = policy_number(module.config)
    policy = policy_at(number)
    refuse_additions(options)
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", None) if causal is None else causal
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.dtype == torch.int32:
        filled = _asked(policy, attention_mask, key)
        if filled is None:
            _require_like(policy.pattern, module, causal, dropout)
            out = _fixed(policy, number, module, query, key, value, attention_mask, scaling)
            return out.transpose(1, 2).contiguous(), None
        key, value, attention_mask = key[:, :, :filled], value[:, :, :filled], None
    cache = key
    n_queries = query.shape[2]
    key, value, attention_mask, places = _held(key, value, attention_mask, n_queries)
    n_keys = key.shape[2]
    if not policy.covers(getattr(module, "layer_idx", None)):
        mask = _dense_layer_mask(attention_mask, query, n_keys, bool(causal))
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)
    pattern = policy.pattern
    causal = _require_like(pattern, module, causal, dropout)
    _require_one_size(query, value)
    if not causal and n_queries != n_keys:
        raise RuntimePolicyError(
            f"a pattern meets {n_queries} queries and {n_keys} keys in `{type(module).__name__}`",
            why="it goes by positions, and these are of two sequences",
            hint="leave the layer out of `layers`, or run the model without a pattern",
        )
    if is_scored(pattern) and n_queries > 1 and not torch.compiler.is_compiling():
        # Steps over a padded cache keep no summaries.
        fixed = n_keys < cache.shape[2] and attention_mask is None and not cannot_ask(query)
        prompt_seen(pattern, module, cache, fixed)
    if not cannot_ask(query):
        policy.require_length(_length(policy, attention_mask, places, n_keys))
    _say_if_plain(query, key)
    if attention_mask is not None and not is_scored(pattern) and order_of(pattern, n_keys) is not None:
        raise RuntimePolicyError("a pattern on a grid does not go with padding or a mask", hint="run without either")
    gone = places is not None and places.shape[2] > n_keys
    rows = False if gone else _step_mask(attention_mask, n_queries, n_keys, causal)
    if n_queries == 1 < n_keys and causal and rows is not False:
        there = rows
        if rows is not None and attention_mask is not None and attention_mask.dim() == 4:
            there = torch.ones_like(rows) if places is None else places[:, 0]
        out = step(pattern, module, query, key, value, rows, scaling, there=there)
    elif attention_mask is None or (attention_mask.dim() == 2 and n_queries == n_keys):
        out = prompt(pattern, query, key, value, attention_mask, scaling, policy.fastest)
    else:
        if n_queries == n_keys and not gone and not cannot_ask(query):
            _require_one_text(pattern, options.get("position_ids"), attention_mask, places)
        out = _masked(pattern, query, key, value, attention_mask, places, causal, scaling)
    return out.transpose(1, 2).contiguous(), None


def _length(policy: Policy, given: Tensor | None, places: Tensor | None, n_keys: int) -> int:
    """Slots that are filled, as far as a mask says, else the number of keys; 0 where nobody has to know."""
    if policy.length_tokens is None:
        return 0
    filled = given if given is not None and given.dim() == 2 else None if places is None else places[:, 1]
    return n_keys if filled is None else int(spans_of(filled)[1].max())


def _held(
    key: Tensor, value: Tensor, mask: Tensor | None, n_queries: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys and values of the slots that are filled, what of the mask is for them, and where tokens and queries are."""
    if mask is not None and mask.dim() == 2:
        filled = mask.shape[1]
        return key[:, :, :filled], value[:, :, :filled], None if mask.dtype == torch.uint8 else mask, None
    if mask is not None and mask.dim() == 4 and mask.shape[2] == n_queries + 2:
        # A sliding cache no longer holds the first tokens.
        return key, value, mask[:, :, :n_queries, mask.shape[3] - key.shape[2] :], mask[:, 0, n_queries:]
    return key, value, mask, None


def _dense_layer_mask(given: Tensor | None, query: Tensor, n_keys: int, causal: bool) -> Tensor | None:
    """The mask of a layer that the pattern is not for, as torch's attention takes it."""
    # Torch's own causal mask starts at the first key, not where a prompt goes on over a cache.
    goes_on = given is None and causal and 1 < query.shape[2] < n_keys
    if goes_on or (given is not None and given.dim() == 2):
        return dense_mask_of(None, given, None, query, n_keys, causal)
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


def _require_one_text(
    pattern: Pattern | Scored, positions: Tensor | None, given: Tensor | None, places: Tensor | None
) -> None:
    """Refuses several texts in one row, each of which the pattern would have to count from its own start.

    Args:
        pattern: what counts.
        positions: as the model numbers the tokens, [B, Q].
        given: the model's mask, [B, 1, Q, Q]; a token that no query reads is padding.
        places: bool [B, 2, Q], where tokens are that are no padding, if that is known.
    """
    if positions is None or positions.dim() != 2 or given is None or isinstance(pattern, Dense):
        return
    read = (given if given.dtype == torch.bool else given >= 0)[:, 0].any(1) if places is None else places[:, 0]
    before = torch.where(read, positions, -1).cummax(1).values
    if bool(((positions[:, 1:] <= before[:, :-1]) & read[:, 1:]).any()):
        raise RuntimePolicyError(
            "several texts lie in one row under a mask that is more than causality and padding",
            why="a pattern counts from the first token of a text, which such a mask does not tell",
            hint="give each text a row of its own, padded on the right",
        )


def _masked(
    pattern: Pattern | Scored, query: Tensor, key: Tensor, value: Tensor, given: Tensor | None, places: Tensor | None,
    causal: bool, scaling: float | None,
) -> Tensor:  # fmt: skip
    """Scaled dot-product attention under the pattern and the mask that the model gave, as one dense mask.

    Raises:
        RuntimePolicyError: for a pattern that scores, which such a mask leaves nothing to count from.
    """
    if is_scored(pattern):
        raise RuntimePolicyError(
            "a pattern that chooses blocks by score meets a mask that is more than causality and padding",
            why="it scores whole prompts and single steps",
            hint="run one prompt at a time, or choose a pattern that goes by position",
        )
    mask = dense_mask_of(pattern, given, places, query, key.shape[2], causal)
    group = query.shape[1] // key.shape[1]
    return nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), mask, scale=scaling
    )


def _require_like(pattern: Pattern | Scored, module: nn.Module, causal: bool | None, dropout: float) -> bool:
    """Whether the layer is causal; refuses one that does not tell or differs from the pattern, and dropout."""
    if causal is None:
        raise RuntimePolicyError(
            f"`{type(module).__name__}` does not tell whether it is causal",
            why="it has no `is_causal`, and a pattern on keys that it should not read would be wrong without a sign",
            hint="leave the layer out of `layers`, or run the model without a pattern",
        )
    if pattern.causal != causal:
        kinds = ("bidirectional", "causal")
        raise RuntimePolicyError(
            f"a {kinds[pattern.causal]} pattern on a {kinds[causal]} attention layer",
            hint="set the pattern's `causal` option to what the model is, or choose a pattern that has one; of a model "
            "of several parts attach it to one, such as `model.language_model`",
        )
    if dropout:
        raise RuntimePolicyError(
            f"`attention_dropout: {dropout}` does not go with a sparse pattern", hint="put the model in eval mode"
        )
    return causal
