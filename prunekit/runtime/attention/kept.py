"""Page summaries that are kept from step to step, so that a step makes only those of its newest page.

A dynamic cache is another tensor after each step, so its summaries are kept by layer and thread. A cache of fixed size
stays where it is; its summaries are kept by its storage, because a captured graph writes to them, until the first
prompt or `forget` after it is gone. In both cases the device decides whether they still hold (`renew_pages`); no prompt
that runs through the pattern is trusted to have left them as they were.

Shapes: B batch, H query heads, G key-value heads, T keys, D head size, P pages.
"""

from __future__ import annotations

import functools
import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from prunekit.core.errors import RuntimePolicyError
from prunekit.runtime.attention.patterns._scored import Scored, is_scored, reads_every_page
from prunekit.runtime.attention.policy import name_of, policy_at
from prunekit_kernels.page_summaries import KeptPages, can_renew, renew_pages


@dataclass(frozen=True)
class _Fixed:
    """Summaries of a layer's cache of fixed size."""

    storage: StorageWeakRef
    layer: weakref.ref[nn.Module]
    pages: KeptPages


class _Growing(threading.local):
    """Summaries of a layer's dynamic cache, of each thread its own: threads may write with one model at a time."""

    made: tuple[Scored, KeptPages] | None = None


# Gone with the layer. The alternative is an attribute on a module that is not ours.
_GROWING: weakref.WeakKeyDictionary[nn.Module, _Growing] = weakref.WeakKeyDictionary()
# By place of the cache in memory, and pattern. The weak reference in each keeps that address from another cache.
_FIXED: dict[tuple[object, ...], _Fixed] = {}


def forget(model: nn.Module) -> None:
    """Drops the page summaries of a model's layers; those of caches of fixed size are made anew at their next step.

    Such summaries go with their cache: a captured graph may still write to them.
    """
    layers = set(model.modules())
    for layer in layers:
        _GROWING.pop(layer, None)
    _drop_those_without_cache()
    for _, fixed in _fixed():
        if fixed.layer() in layers:
            fixed.pages.covered.zero_()


def prompt_seen(pattern: Scored, layer: nn.Module, cache: Tensor, fixed: bool) -> None:
    """Lets the next step make all summaries anew; of a cache of fixed size [B, G, T, D] also finds room for them."""
    _growing(layer).made = None
    _drop_those_without_cache()
    if fixed:
        find_room(pattern, layer, cache)
    here = _place(cache)
    for place, kept in _fixed():
        if place[:-1] == here:
            kept.pages.covered.zero_()


def find_room(pattern: Scored, layer: nn.Module, cache: Tensor) -> None:
    """Room for summaries of a cache of fixed size [B, G, T, D], if it has none yet.

    Not for a step that is captured: what capturing makes holds nothing before the first replay.
    """
    size, place = pattern.pages[0], (*_place(cache), pattern)
    if reads_every_page(pattern, cache.shape[2]) or place in _FIXED or not can_renew(cache, size):
        return
    _drop_those_without_cache()
    with torch.inference_mode(False):
        room = KeptPages.room(cache, size, -(-cache.shape[2] // size), _is_mean(pattern, cache))
    _FIXED[place] = _Fixed(StorageWeakRef(cache.untyped_storage()), weakref.ref(layer), room)


def growing_summaries(pattern: Scored, layer: nn.Module, key: Tensor) -> tuple[Tensor, ...]:
    """Summaries of all pages of a dynamic cache [B, G, T, D], those that are known not made again."""
    size = pattern.pages[0]
    if not can_renew(key, size):
        return pattern.summaries(key)
    n_pages = -(-key.shape[2] // size)
    growing = _growing(layer)
    known, kept = growing.made or (None, None)
    with torch.inference_mode(False):
        if known != pattern or kept is None or not kept.fits(key):
            kept = KeptPages.room(key, size, 0, _is_mean(pattern, key))
        kept = kept.grown(n_pages)
    renew_pages(key.detach(), _count(key.shape[2], len(key), str(key.device)), kept)
    growing.made = (pattern, kept)
    return tuple(t[:, :, :n_pages] for t in kept.summaries)


def _growing(layer: nn.Module) -> _Growing:
    return _GROWING.setdefault(layer, _Growing())


# What it keeps is no output, and nothing else reads it: to a compiler this is a function of its arguments.
@torch.library.custom_op("prunekit::fixed_page_scores", mutates_args=())
def fixed_page_scores(q: Tensor, key: Tensor, filled: Tensor, number: int) -> Tensor:
    """Scores of all pages of a cache of fixed size, those past the filled ones without meaning.

    Args:
        q: [B, H, 1, D].
        key: [B, G, T, D].
        filled: int32 [B], how many tokens of each sequence are there.
        number: of the policy whose pattern scores.
    Returns:
        Float32 [B, G, P], higher = keep.
    """
    pattern = policy_at(number).pattern
    if not is_scored(pattern):
        raise RuntimePolicyError(f"the pattern `{name_of(pattern)}` scores no pages")
    kept = _FIXED.get((*_place(key), pattern))
    if kept is None:
        return pattern.page_scores(q, pattern.summaries(key))
    renew_pages(key, filled, kept.pages)
    return pattern.page_scores(q, kept.pages.summaries)


@fixed_page_scores.register_fake
def _fixed_page_scores_fake(q: Tensor, key: Tensor, filled: Tensor, number: int) -> Tensor:
    pattern = policy_at(number).pattern
    size = pattern.pages[0] if is_scored(pattern) else 1
    return key.new_empty((*key.shape[:2], -(-key.shape[2] // size)), dtype=torch.float32)


def _place(cache: Tensor) -> tuple[object, ...]:
    """What tells a cache from every other that is alive."""
    return cache.untyped_storage()._cdata, cache.storage_offset(), tuple(cache.shape), cache.stride(), cache.dtype


def _drop_those_without_cache() -> None:
    for place, kept in _fixed():
        if kept.storage.expired():
            _FIXED.pop(place, None)


def _fixed() -> list[tuple[tuple[object, ...], _Fixed]]:
    """What `_FIXED` holds now; other threads may write to it while one walks through it."""
    return list(_FIXED.items())


def _is_mean(pattern: Scored, cache: Tensor) -> bool:
    """Whether a page is known by its mean, instead of by its smallest and largest values."""
    return len(pattern.summaries(cache[:1, :1, :1])) == 1


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _count(n_keys: int, batch: int, device: str) -> Tensor:
    """The same number for each sequence, int32 [B]; layers share it."""
    return torch.full((batch,), n_keys, dtype=torch.int32, device=device)
