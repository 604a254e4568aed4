"""One step of a sequence: which cached tokens it reads, and attention over them.

A static pattern names tokens by position, a scored one pages by score; a mask that the model gives takes tokens away.
All become lists for the decode kernel, or for its counterpart in plain torch on a CPU.

Shapes: B batch, H query heads, G key-value heads, T keys, D head size, P pages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from prunekit.runtime.attention.kept import find_room, fixed_page_scores, growing_summaries
from prunekit.runtime.attention.patterns._engine import Pattern, order_of
from prunekit.runtime.attention.patterns._scored import Scored, is_scored, reads_every_page
from prunekit.runtime.attention.patterns.dense import Dense
from prunekit_kernels.block_scores import select_blocks
from prunekit_kernels.sparse_decode import PageLists, sparse_decode

WHOLE_PAGE = 64
Made = TypeVar("Made")


def step(
    pattern: Pattern | Scored, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    scaling: float | None, *, there: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of the newest token of each sequence.

    Args:
        pattern: what it reads.
        module: the attention layer, for which page summaries are kept from step to step.
        query: [B, H, 1, D].
        key: [B, G, T, D]; `value` alike.
        mask: bool [B or 1, T], the tokens that may be read, or None for all.
        scaling: factor on the scores, 1 / sqrt(D) if None.
        there: bool [B or 1, T], the tokens that positions count; None for those of `mask`.
    Returns:
        [B, H, 1, D].
    """
    batch, kv_heads, n_keys = key.shape[:3]
    if is_scored(pattern):
        lists = _scored_lists(pattern, module, query, key, mask, there)
    elif mask is None:
        lists = _static_lists(pattern, n_keys, batch, kv_heads, str(key.device))
    else:
        lists = PageLists.from_mask((mask & _seen(pattern, mask, there))[:, None].expand(batch, -1, -1), kv_heads)
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        key, value = key.contiguous(), value.contiguous()
    return sparse_decode(query, key, value, lists, scale=scaling)[0]


def fixed_step(
    pattern: Pattern | Scored, number: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    filled: Tensor, scaling: float | None,
) -> Tensor:  # fmt: skip
    """Attention of the newest token of each sequence over a cache of fixed size, the same eager, compiled or captured.

    How far the cache is filled is known to the device alone.

    Args:
        pattern: what it reads, none with an order of its own.
        number: of the policy that names it, if it chooses by score.
        module: the attention layer.
        query: [B, H, 1, D].
        key: [B, G, T, D]; `value` alike.
        filled: int32 [B, 1, 1, 1], how many of the T tokens are there, the newest among them. All layers of a step
            share the tensor.
        scaling: factor on the scores, 1 / sqrt(D) if None.
    Returns:
        [B, H, 1, D].
    """
    counts, (kv_heads, n_keys) = filled.view(-1), key.shape[1:3]
    if isinstance(pattern, Dense) or (is_scored(pattern) and reads_every_page(pattern, n_keys)):
        lists = _shared(filled, module, ("whole", kv_heads), lambda: _first_tokens(counts, kv_heads, n_keys))
    elif is_scored(pattern):
        size, keep = pattern.pages
        if not cannot_ask(key):
            find_room(pattern, module, key)
        scores = fixed_page_scores(query, key, counts, number)
        shape = _shared(
            filled, module, (size, keep, kv_heads), lambda: _fixed_table(counts, kv_heads, n_keys, size, keep)
        )
        lists = _fixed_lists(scores, shape, n_keys, size, keep)
    else:
        lists = _shared(filled, module, (pattern, kv_heads), lambda: _allowed_tokens(pattern, counts, kv_heads, n_keys))
    return sparse_decode(query, key, value, lists, scale=scaling)[0]


def cannot_ask(tensor: Tensor) -> bool:
    """Whether the values of a tensor cannot be looked at now, because the step is being compiled or captured."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def spans_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First slot of each row that is true and one past its last, int32 [B]."""
    marks = mask.to(torch.int32)
    ends = mask.shape[1] - marks.flip(1).argmax(1)
    return marks.argmax(1).to(torch.int32), ends.to(torch.int32)


def _positions(mask: Tensor, there: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens of a step are.

    Returns:
        int64: the position of each slot [B, T], without meaning where no token is; the slot of the newest token that
        may be read [B, 1], and its position [B, 1].
    """
    position = ((mask if there is None else there).long().cumsum(1) - 1).expand_as(mask)
    newest = spans_of(mask)[1].long()[:, None] - 1
    return position, newest, position.gather(1, newest)


def _seen(pattern: Pattern, mask: Tensor, there: Tensor | None) -> Tensor:
    """Bool [B, T], what the last token that may be read reads itself."""
    k, _, q = _positions(mask, there)
    return pattern.allows(q, k)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _static_lists(pattern: Pattern, n_keys: int, batch: int, kv_heads: int, device: str) -> PageLists:
    """The same list for all sequences and heads; all layers of a step share it."""
    newest = torch.tensor(n_keys - 1)
    found = [torch.zeros(0, dtype=torch.int64)]
    # Ranges of a pattern with an order of its own are ranges of slots.
    ordered = order_of(pattern, n_keys) is not None
    for start, end in ((0, n_keys),) if ordered else pattern.key_ranges(n_keys - 1, n_keys - 1, n_keys):
        k = torch.arange(max(start, 0), min(end, n_keys))
        found.append(k[pattern.allows(newest, k)])
    tokens = torch.cat(found).unique()
    count = torch.full((batch, kv_heads), len(tokens), dtype=torch.int32, device=device)
    if len(tokens) == n_keys:
        return PageLists.whole(count, n_keys, WHOLE_PAGE)
    return PageLists(
        indices=tokens.to(device, torch.int32), starts=torch.zeros_like(count), tokens=count, page_tokens=1,
        paged=False, longest=len(tokens), total=batch * kv_heads * len(tokens),
    )  # fmt: skip


def _scored_lists(
    pattern: Scored, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, there: Tensor | None
) -> PageLists:
    """The pages with the best scores, the newest token's among them; with a mask, their tokens that it leaves."""
    batch, kv_heads, n_keys = key.shape[:3]
    if reads_every_page(pattern, n_keys):
        if mask is not None:
            return PageLists.from_mask(mask[:, None].expand(batch, -1, -1), kv_heads)
        count = torch.full((batch, kv_heads), n_keys, dtype=torch.int32, device=key.device)
        return PageLists.whole(count, n_keys, WHOLE_PAGE)
    if mask is not None:
        return _masked_lists(pattern, query, key, mask, there)
    size, keep = pattern.pages
    summaries = pattern.summaries(key) if cannot_ask(key) else growing_summaries(pattern, module, key)
    pages = _best_pages(pattern.page_scores(query, summaries), n_keys, size, keep, window=1)
    read = (keep - 1) * size + (n_keys - 1) % size + 1
    # A captured step makes its own: what capturing makes holds nothing before the first replay.
    make = _table_shape.__wrapped__ if cannot_ask(key) else _table_shape
    starts, count = make(batch, kv_heads, keep, read, str(key.device))
    return PageLists(
        indices=pages.reshape(-1), starts=starts, tokens=count, page_tokens=size, paged=False, longest=keep * size,
        total=batch * kv_heads * keep * size,
    )  # fmt: skip


def _masked_lists(pattern: Scored, query: Tensor, key: Tensor, mask: Tensor, there: Tensor | None) -> PageLists:
    """Tokens of the best pages that a mask leaves; pages count from where positions do."""
    batch, kv_heads, n_keys, channels = key.shape
    size, keep = pattern.pages
    n_pages = -(-n_keys // size)
    mask = mask.expand(batch, -1)
    position, newest, last = _positions(mask, there)
    # The slot of the token at each position. Padding must not shape a page's summary: in place of it stands the newest
    # token, whose page is read anyway.
    slots = torch.arange(n_keys, device=key.device).expand(batch, -1)
    goal = torch.where(mask if there is None else there, position, n_keys)
    place = newest.repeat(1, n_keys + 1).scatter(1, goal, slots)[:, :n_keys]
    inner = mask.gather(1, place) & (slots <= last)
    place = torch.where(inner, place, newest)
    key = key.gather(2, place[:, None, :, None].expand(-1, kv_heads, -1, channels))
    scores = pattern.page_scores(query, pattern.summaries(key))
    used = pad(inner, (0, n_pages * size - n_keys)).unflatten(1, (n_pages, size)).any(2)
    at = (last // size)[:, None].expand(-1, kv_heads, -1)
    scores = scores.masked_fill(~used[:, None], float("-inf")).scatter(2, at, float("inf"))
    pages = _best_pages(scores, n_keys, size, keep, window=0)
    chosen = torch.zeros(batch, kv_heads, n_pages, dtype=torch.bool, device=key.device)
    chosen.scatter_(2, pages.long(), True)
    tokens = chosen.repeat_interleave(size, 2)[..., :n_keys]
    tokens = tokens.gather(2, position.clamp(min=0)[:, None].expand(-1, kv_heads, -1))
    return PageLists.from_mask(tokens & mask[:, None], kv_heads)


def _best_pages(scores: Tensor, n_keys: int, size: int, keep: int, window: int) -> Tensor:
    """Pages with the best scores [B, G, P] in order, int32 [B, G, keep]; the last `window` of all are among them."""
    _, _, table = select_blocks(
        scores.flatten(0, 1).unsqueeze(1), 1, n_keys, block_q=1, block_k=size, q_offset=n_keys - 1, keep=keep, sink=0,
        window=window, ascending=True,
    )  # fmt: skip
    return table[:, 0, :keep].unflatten(0, scores.shape[:2])


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _table_shape(batch: int, kv_heads: int, width: int, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """Where each list of a table of pages begins and how many tokens it reads, int32 [B, G]; layers share them."""
    starts = torch.arange(batch * kv_heads, dtype=torch.int32, device=device).view(batch, kv_heads) * width
    return starts, torch.full((batch, kv_heads), tokens, dtype=torch.int32, device=device)


# What the layers of a step share, by the tensor that says how far their cache is filled, and gone with it; beside it
# the last layer that asked.
_SHARED = WeakTensorKeyDictionary()


def _shared(filled: Tensor, module: nn.Module, what: object, make: Callable[[], Made]) -> Made:
    """What `make` made for an earlier layer of this step.

    The first layer of a step always makes its own: what was made while one graph was captured is none of another's.
    """
    layer = getattr(module, "layer_idx", None)
    if torch.compiler.is_compiling() or layer is None:
        return make()
    last, made = _SHARED.get(filled, (layer, {}))
    if layer <= last:
        made = {}
    if what not in made:
        made[what] = make()
    _SHARED[filled] = (layer, made)
    found: Made = made[what]
    return found


def _first_tokens(filled: Tensor, kv_heads: int, n_keys: int) -> PageLists:
    """Lists of all tokens that are there."""
    return PageLists.whole(filled[:, None].expand(-1, kv_heads), n_keys, WHOLE_PAGE)


def _allowed_tokens(pattern: Pattern, filled: Tensor, kv_heads: int, n_keys: int) -> PageLists:
    """Lists of the tokens that a pattern by position lets the newest one read."""
    k, newest = torch.arange(n_keys, device=filled.device), filled[:, None] - 1
    return PageLists.from_mask((pattern.allows(newest, k) & (k <= newest))[:, None], kv_heads)


def _fixed_table(filled: Tensor, kv_heads: int, n_keys: int, size: int, keep: int) -> tuple[Tensor, ...]:
    """What a table of the best pages is made with, besides scores.

    Returns:
        Bool [B, 1, P], the newest page and those after it; float32 [B, 1, P], their scores instead; int32 [B, G], where
        each list begins and how many tokens it reads.
    """
    page, newest = torch.arange(-(-n_keys // size), device=filled.device), ((filled - 1) // size)[:, None, None]
    scores = torch.full((len(filled), 1, len(page)), float("-inf"), device=filled.device)
    scores.masked_fill_(page == newest, float("inf"))
    last = filled - (filled - 1) // size * size
    tokens = torch.minimum(filled, last + (keep - 1) * size).to(torch.int32)[:, None].expand(-1, kv_heads).contiguous()
    starts = torch.arange(tokens.numel(), dtype=torch.int32, device=filled.device).view_as(tokens) * keep
    return page >= newest, scores, starts, tokens


def _fixed_lists(scores: Tensor, shape: tuple[Tensor, ...], n_keys: int, size: int, keep: int) -> PageLists:
    """The pages with the best scores, in order, so that pages that nobody filled come last and are not read."""
    special, instead, starts, tokens = shape
    pages = _best_pages(torch.where(special, instead, scores), n_keys, size, keep, window=0)
    return PageLists(
        indices=pages.reshape(-1), starts=starts, tokens=tokens, page_tokens=size, paged=False,
        longest=keep * size, total=tokens.numel() * keep * size,
    )  # fmt: skip
