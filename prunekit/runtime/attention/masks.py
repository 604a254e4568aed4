"""What the attention function is told about causality and padding, and how it is read as a dense mask.

Shapes: B batch, H query heads, Q queries, T keys, D head size, O tokens that a sliding cache no longer holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from prunekit.runtime.attention.decode import cannot_ask, spans_of
from prunekit.runtime.attention.patterns._engine import Pattern


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None, **options: Any,
) -> Tensor | None:  # fmt: skip
    """What the attention function needs to know about causality and padding.

    Returns:
        None for a plain causal or plain bidirectional batch without padding that fills the keys; bool [B, n] for one
        with padding on the left or right, and for a step of one token with padding anywhere; uint8 [B, n] for one
        without, where only the first n slots of a cache of fixed size are filled; int32 [B, 1, 1, 1] for a step of one
        token over such a cache, how many slots are filled; bool [B, T] for such a step with padding. For everything
        else bool [B, 1, Q + 2, O + T]: a row for each query, then where tokens are that are no padding, then where the
        queries are.
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
        whole = padding is not None and padding.shape[1] == filled
        if plain and padding is not None and whole and (q_length == 1 or _in_one_piece(padding)):
            # Of one width in all steps: `generate` hands it to a compiled model, which has a graph for each width.
            return pad(padding, (0, kv_length - filled)) if one else padding
    options = {**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, **options,
    )  # fmt: skip
    return torch.cat([pad(mask, (kv_offset, 0)), _places(mask, attention_mask, q_offset, q_length, kv_offset)], 2)


def _places(mask: Tensor, given: Tensor | None, q_offset: int | Tensor, q_length: int, kv_offset: int) -> Tensor:
    """Where tokens are that are no padding, and where queries are, bool [B, 1, 2, O + T], for a mask [B, 1, Q, T]."""
    place = torch.arange(kv_offset + mask.shape[3], device=mask.device)
    known, queries = place < q_offset + q_length, (place >= q_offset) & (place < q_offset + q_length)
    there = known.expand(len(mask), -1)
    if given is not None:
        there = there & pad(given.bool(), (0, max(0, len(place) - given.shape[1])))[:, : len(place)]
    return torch.stack([there, queries.expand_as(there)], 1)[:, None]


def _filled_slots(q_offset: Tensor, batch_size: int) -> Tensor:
    """How many slots of a cache of fixed size are filled in a step of one token, int32 [B, 1, 1, 1].

    Four dimensions, because transformers takes such a mask as it is where `generate` hands it to a compiled model.
    """
    return (q_offset + 1).to(torch.int32).reshape(1, 1, 1, 1).repeat(batch_size, 1, 1, 1)


def _in_one_piece(padding: Tensor) -> bool:
    """Whether the tokens of every sequence lie side by side."""
    starts, ends = spans_of(padding)
    return bool(((ends - starts) == padding.sum(1)).all())


def dense_mask_of(
    pattern: Pattern | None, given: Tensor | None, places: Tensor | None, query: Tensor, n_keys: int, causal: bool
) -> Tensor:  # fmt: skip
    """Mask [B or 1, 1, Q, T] of the pattern (None: every key) together with the one that the model gave.

    Args:
        pattern: what it reads.
        given: bool [B, T] for padding, or a mask [B, 1, Q, T].
        places: with that, where tokens and queries are, bool [B, 2, O + T]; None if the first key is of position 0.
        query: [B, H, Q, D].
        n_keys: T.
        causal: whether keys after the query are hidden, where the given mask does not say.
    """
    n_queries = query.shape[2]
    k = torch.arange(n_keys, device=query.device)[None, None, :]
    q = k[..., n_keys - n_queries :].mT
    if given is None or given.dim() == 2:
        there = k >= 0 if given is None else given[:, None, :n_keys]
        at = there.long().cumsum(2) - 1
        seen = (pattern.allows(at[..., n_keys - n_queries :].mT, at) if pattern else (k <= q) | (not causal)) & there
        # A query without any key, which is one of padding, reads its own slot, so that its softmax stays finite.
        return (seen | ((k == q) & ~seen.any(-1, keepdim=True)))[:, None]
    given = given[..., :n_keys]
    if places is not None:
        at = places[:, 0].long().cumsum(1) - 1
        first = places[:, 1].int().argmax(1, keepdim=True)
        q = at.gather(1, first + torch.arange(n_queries, device=query.device))[:, :, None]
        k = at[:, None, at.shape[1] - n_keys :]
    elif causal:
        # The last key that a causal mask shows is the query's own; slots past it may be a cache not yet filled.
        shown = given if given.dtype == torch.bool else given >= 0
        q = (n_keys - 1 - shown.flip(-1).int().argmax(-1, keepdim=True))[:, 0]
    seen = (pattern.allows(q, k) if pattern else (k <= q) | (not causal))[:, None]
    if causal:
        # Keys after the query that the model shows all the same, such as the rest of an image, are its own affair.
        seen = seen | (k > q)[:, None]
    return given & seen if given.dtype == torch.bool else given.masked_fill(~seen, torch.finfo(given.dtype).min)
