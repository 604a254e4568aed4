"""Block scores and block choice as torch operations: the reference on a CPU, the kernels on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit_kernels._device import HALF, capability, copyable, no_kernels
from prunekit_kernels.block_scores.reference import folded_scores, select_reference
from prunekit_kernels.block_sparse_prefill.lists import BlockLists

MAX_BLOCKS = 16384


def refusal(tensor: Tensor, blocks: int) -> str:
    """Why no kernel takes a row of so many blocks on this device, or an empty string if one does."""
    if reason := no_kernels(tensor):
        return reason
    if blocks > MAX_BLOCKS:
        return f"{blocks} blocks of keys are more than {MAX_BLOCKS}"
    return ""


def hopper_takes(q: Tensor, k: Tensor, inner: int) -> bool:
    """Whether the Hopper kernel, whose tiles are of 256 folded keys, covers the case, for blocks of `inner` of them."""
    return (
        capability(q.device.index or 0) == (9, 0)
        and q.shape[-1] in (64, 128)
        and 256 % inner == 0
        and copyable(q)
        and copyable(k)
    )


@torch.library.custom_op("prunekit::antidiagonal_scores", mutates_args=())
def _scores(
    q: Tensor, k: Tensor, stride: int, step: int, block_q: int, block_k: int, q_offset: int, causal: bool, scale: float
) -> Tensor:
    half = q.dtype in HALF
    if refusal(q, -(-k.shape[2] // block_k)) or not half or q.stride(-1) != 1 or k.stride(-1) != 1:
        return folded_scores(q, k, stride, step, block_q, block_k, q_offset, causal, scale)
    from prunekit_kernels.block_scores import portable

    if hopper_takes(q, k, block_k // stride):
        from prunekit_kernels.block_scores import hopper

        lse = hopper.log_sums(q, k, stride, step, block_k, q_offset, causal, scale)
        return portable.summed(lse, q.shape[2], stride * step, block_q, block_k, q_offset, causal)
    return portable.folded(q, k, stride, step, block_q, block_k, q_offset, causal, scale)


@_scores.register_fake
def _scores_fake(
    q: Tensor, k: Tensor, stride: int, step: int, block_q: int, block_k: int, q_offset: int, causal: bool, scale: float
) -> Tensor:
    return q.new_empty((*q.shape[:2], -(-q.shape[2] // block_q), -(-k.shape[2] // block_k)), dtype=torch.float32)


@torch.library.custom_op("prunekit::select_blocks", mutates_args=())
def _select(
    scores: Tensor, block_q: int, block_k: int, n_queries: int, n_keys: int, q_offset: int, causal: bool,
    keep: int, mass: float, sink: int, window: int, width: int, ascending: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    arguments = (block_q, block_k, n_queries, n_keys, q_offset, causal, keep, mass, sink, window, width, ascending)
    if refusal(scores, scores.shape[-1]):
        return select_reference(scores, *arguments)
    from prunekit_kernels.block_scores import portable

    return portable.select(scores, *arguments)


@_select.register_fake
def _select_fake(
    scores: Tensor, block_q: int, block_k: int, n_queries: int, n_keys: int, q_offset: int, causal: bool,
    keep: int, mass: float, sink: int, window: int, width: int, ascending: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    counts = scores.new_empty(scores.shape[:-1], dtype=torch.int32)
    return counts, torch.empty_like(counts), scores.new_empty((*scores.shape[:-1], width), dtype=torch.int32)


def antidiagonal_scores(
    q: Tensor, k: Tensor, *, stride: int = 16, step: int = 1, block_q: int = 128, block_k: int = 128,
    q_offset: int = 0, causal: bool = True, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention mass of blocks, estimated from one in `stride * step` of the products, those on antidiagonals.

    Runs of `stride` queries, reversed, and of `stride` keys are folded into one long vector each; the softmax of their
    products divided by `stride` is summed over the blocks. Of each `step` runs of queries the last alone is scored; so
    is the last of all.

    Args:
        q: [B, H, S, D].
        k: [B, G, T, D], G dividing H.
        stride: fold, dividing both block sizes.
        step: runs of queries of which one is scored; `stride * step` divides `block_q`.
        block_q: queries of a block.
        block_k: keys of a block.
        q_offset: position of the first query among the keys.
        causal: whether keys after the query are hidden.
        scale: factor on the scores, 1 / sqrt(D) if None.
    Returns:
        float32 [B, H, R, C]; a row sums to block_q / (stride * step), or fewer in the last row. Higher = keep.
    Raises:
        ValueError: if `stride` does not divide the block sizes, or `stride * step` the block of queries.
    """
    if block_q % stride or block_k % stride:
        raise ValueError(f"a stride of {stride} does not divide blocks of {block_q} and {block_k}")
    if block_q % (stride * step):
        raise ValueError(f"one in {step} runs of {stride} queries is not in every block of {block_q}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _scores(q, k, stride, step, block_q, block_k, q_offset, causal, scale)


def select_blocks(
    scores: Tensor, n_queries: int, n_keys: int, *, block_q: int = 128, block_k: int = 128, q_offset: int = 0,
    causal: bool = True, keep: int = 0, mass: float = 0.0, sink: int = 1, window: int = 1, ascending: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The blocks that each block of queries reads, by score.

    Args:
        scores: float32 [..., R, C], higher = keep.
        n_queries: queries; the last row may hold fewer than `block_q`.
        n_keys: keys; the last block may hold fewer than `block_k`.
        block_q: queries of a block.
        block_k: keys of a block.
        q_offset: position of the first query among the keys.
        causal: whether keys after the query are hidden.
        keep: blocks of a row, those always kept included; 0 leaves it to `mass`.
        mass: share of a row's score that the kept blocks reach, largest first; 0 with `keep` 0 keeps all blocks whose
            score is above zero.
        sink: first blocks that are always kept.
        window: blocks up to the query's own that are always kept, on both sides when not causal; a row may keep nothing
            if this is 0.
        ascending: list blocks by number, instead of masked ones first and near ones first.
    Returns:
        int32 [..., R] listed blocks, [..., R] how many of them want a mask inside, [..., R, W] block numbers, zero
        past the listed ones.
    """
    cols = scores.shape[-1]
    width = cols
    if keep > 0:
        width = min(cols, max(keep, sink + 2 * window + -(-block_q // block_k)))
    return _select(
        scores.float(), block_q, block_k, n_queries, n_keys, q_offset, causal, keep, mass, sink, window, width,
        ascending,
    )  # fmt: skip


def scored_lists(
    scores: Tensor, n_queries: int, n_keys: int, *, block_q: int = 128, block_k: int = 128, causal: bool = True,
    keep: int = 0, mass: float = 0.0, sink: int = 1, window: int = 1,
) -> BlockLists:  # fmt: skip
    """Block lists per head from scores [H, R, C]; the last query stands at the last key. Options as `select_blocks`.

    The pairs are not counted: that would wait for the device.
    """
    offset = n_keys - n_queries
    counts, partials, indices = select_blocks(
        scores, n_queries, n_keys, block_q=block_q, block_k=block_k, q_offset=offset, causal=causal, keep=keep,
        mass=mass, sink=sink, window=window,
    )  # fmt: skip
    return BlockLists(
        counts=counts, partials=partials, indices=indices, mask_ids=None, masks=None, block_q=block_q,
        block_k=block_k, n_queries=n_queries, n_keys=n_keys, q_offset=offset, causal=causal, pairs=0, shortest=1,
    )  # fmt: skip
