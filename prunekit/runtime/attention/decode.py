"""One step of a sequence: which cached tokens it reads, and attention over them.

A static pattern names tokens by position, a scored one pages by score; a mask that the model gives takes tokens away.
All become lists for the decode kernel, or for its plain reference without a GPU.

Shapes: B batch, H query heads, G key-value heads, T keys, D head size, P pages.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from prunekit.runtime.attention.patterns._engine import Pattern, order_of
from prunekit.runtime.attention.patterns._scored import Scored, is_scored
from prunekit_kernels.block_scores import select_blocks
from prunekit_kernels.sparse_decode import PageLists, sparse_decode

WHOLE_PAGE = 64


def step(
    pattern: Pattern | Scored, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    scaling: float | None, *, from_first: bool = True,
) -> Tensor:  # fmt: skip
    """Attention of the newest token of each sequence.

    Args:
        pattern: what it reads.
        module: the attention layer, for which page summaries are kept from step to step.
        query: [B, H, 1, D].
        key: [B, G, T, D]; `value` alike.
        mask: bool [B or 1, T], the tokens that may be read, or None for all.
        scaling: factor on the scores, 1 / sqrt(D) if None.
        from_first: whether positions count from the first token that may be read, instead of from slot 0.
    Returns:
        [B, H, 1, D].
    """
    batch, kv_heads, n_keys = key.shape[:3]
    if is_scored(pattern):
        lists = _scored_lists(pattern, module, query, key, mask)
    elif mask is None:
        lists = _static_lists(pattern, n_keys, batch, kv_heads, str(key.device))
    else:
        lists = PageLists.from_mask((mask & _seen(pattern, mask, from_first))[:, None].expand(batch, -1, -1), kv_heads)
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        key, value = key.contiguous(), value.contiguous()
    return sparse_decode(query, key, value, lists, scale=scaling)[0]


def cannot_ask(tensor: Tensor) -> bool:
    """Whether the values of a tensor cannot be looked at now, because the step is being compiled or captured."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def forget(model: nn.Module) -> None:
    """Drops the page summaries that are kept for the layers of a model."""
    for module in model.modules():
        _KEPT.pop(module, None)


def spans_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First slot of each row that is true and one past its last, int32 [B]."""
    marks = mask.to(torch.int32)
    ends = mask.shape[1] - marks.flip(1).argmax(1)
    return marks.argmax(1).to(torch.int32), ends.to(torch.int32)


def _seen(pattern: Pattern, mask: Tensor, from_first: bool) -> Tensor:
    """Bool [B, T], what the last token that may be read reads itself."""
    first, end = spans_of(mask)
    first = first if from_first else torch.zeros_like(first)
    k = torch.arange(mask.shape[1], device=mask.device) - first[:, None]
    return pattern.allows((end - 1 - first)[:, None], k) & (k >= 0)


@functools.lru_cache(maxsize=16)
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


def _scored_lists(pattern: Scored, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> PageLists:
    """The pages with the best scores, the newest token's among them; with a mask, their tokens that it leaves."""
    batch, kv_heads, n_keys = key.shape[:3]
    size, keep = pattern.pages
    n_pages = -(-n_keys // size) if size else 0
    if n_pages <= keep:
        if mask is not None:
            return PageLists.from_mask(mask[:, None].expand(batch, -1, -1), kv_heads)
        count = torch.full((batch, kv_heads), n_keys, dtype=torch.int32, device=key.device)
        return PageLists.whole(count, n_keys, WHOLE_PAGE)
    if mask is not None:
        # Padding must not shape a page's summary: it takes the values of the newest token, whose page is read anyway.
        newest = (spans_of(mask)[1] - 1).long().view(-1, 1, 1).expand(batch, kv_heads, 1)
        key = torch.where(
            mask[:, None, :, None], key, key.gather(2, newest[..., None].expand(-1, -1, -1, key.shape[-1]))
        )
        scores = pattern.page_scores(query, pattern.summaries(key))
        used = pad(mask, (0, n_pages * size - n_keys)).unflatten(1, (n_pages, size)).any(2)
        scores = scores.masked_fill(~used[:, None], float("-inf")).scatter(2, newest // size, float("inf"))
    else:
        scores = pattern.page_scores(query, _kept_summaries(pattern, module, key))
    _, _, table = select_blocks(
        scores.flatten(0, 1).unsqueeze(1), 1, n_keys, block_q=1, block_k=size, q_offset=n_keys - 1, keep=keep, sink=0,
        window=1 if mask is None else 0, ascending=True,
    )  # fmt: skip
    pages = table[:, 0, :keep].unflatten(0, (batch, kv_heads))
    if mask is not None:
        chosen = torch.zeros(batch, kv_heads, n_pages, dtype=torch.bool, device=key.device)
        chosen.scatter_(2, pages.long(), True)
        tokens = chosen.repeat_interleave(size, 2)[..., :n_keys] & mask[:, None]
        return PageLists.from_mask(tokens, kv_heads)
    read = (keep - 1) * size + n_keys - (n_pages - 1) * size
    # A captured step makes its own: what capturing makes holds nothing before the first replay.
    make = _table_shape.__wrapped__ if cannot_ask(key) else _table_shape
    starts, count = make(batch, kv_heads, keep, read, str(key.device))
    return PageLists(
        indices=pages.reshape(-1), starts=starts, tokens=count, page_tokens=size, paged=False, longest=keep * size,
        total=batch * kv_heads * keep * size,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _table_shape(batch: int, kv_heads: int, width: int, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """Where each list of a table of pages begins and how many tokens it reads, int32 [B, G]; layers share them."""
    starts = torch.arange(batch * kv_heads, dtype=torch.int32, device=device).view(batch, kv_heads) * width
    return starts, torch.full((batch, kv_heads), tokens, dtype=torch.int32, device=device)


@dataclass
class _Kept:
    """Page summaries of a layer's cache, with room to grow, and the newest keys they were made from."""

    pattern: Scored
    room: tuple[Tensor, ...]
    n_keys: int
    newest: Tensor

    def continues(self, pattern: Scored, key: Tensor) -> bool:
        """Whether `key` is the same cache with tokens added, as far as its newest page tells."""
        at = slice(self.n_keys - self.newest.shape[2], self.n_keys)
        return (
            pattern == self.pattern
            and key.shape[2] >= self.n_keys
            and key.shape[:2] == self.newest.shape[:2]
            and key.dtype == self.newest.dtype
            and key.device == self.newest.device
            and torch.equal(key[:, :, at], self.newest)
        )


# By layer, and gone with it. The alternative is an attribute on a module that is not ours.
_KEPT: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def _kept_summaries(pattern: Scored, module: nn.Module, key: Tensor) -> tuple[Tensor, ...]:
    """Summaries of all pages, computed only for pages that are new or were not full at the last step.

    A cache whose newest page changed since, by another prompt or reordered beams, is read anew. So it is in a compiled
    or captured step, which cannot ask.
    """
    if cannot_ask(key):
        return pattern.summaries(key)
    size = pattern.pages[0]
    n_keys = key.shape[2]
    n_pages = -(-n_keys // size)
    kept = _KEPT.get(module)
    if kept is None or not kept.continues(pattern, key):
        fresh = pattern.summaries(key)
        room = tuple(torch.empty(*t.shape[:2], 0, t.shape[3], dtype=t.dtype, device=t.device) for t in fresh)
        first = 0
    else:
        first = kept.n_keys // size
        fresh = pattern.summaries(key[:, :, first * size :])
        room = kept.room
    if room[0].shape[2] < n_pages:
        grown = tuple(t.new_empty(*t.shape[:2], n_pages + n_pages // 8 + 8, t.shape[3]) for t in room)
        for new, old in zip(grown, room, strict=True):
            new[:, :, : old.shape[2]] = old
        room = grown
    for all_pages, part in zip(room, fresh, strict=True):
        all_pages[:, :, first:n_pages] = part
    _KEPT[module] = _Kept(pattern, room, n_keys, key[:, :, max(0, n_keys - size) :].clone())
    return tuple(t[:, :, :n_pages] for t in room)
