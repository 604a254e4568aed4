"""Block-sparse prefill as a torch operation: gathered blocks on a CPU, kernels on CUDA, the reference elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunekit_kernels._cpu import has_flash
from prunekit_kernels._device import HALF, capability, copyable, no_head_size, no_kernels
from prunekit_kernels.block_sparse_prefill import cpu
from prunekit_kernels.block_sparse_prefill.lists import BlockLists
from prunekit_kernels.block_sparse_prefill.reference import (
    backward_reference,
    gated_backward_reference,
    prefill_reference,
)


def refusal(q: Tensor, k: Tensor) -> str:
    """Why no kernel takes these tensors, or an empty string if one does."""
    if reason := no_kernels(q):
        return reason
    if q.dtype not in HALF:
        return f"dtype {q.dtype} is not one of bfloat16, float16"
    if reason := no_head_size(q):
        return reason
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key-value heads"
    return ""


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor as the copy engine wants it."""
    return tensor if copyable(tensor) else tensor.contiguous()


def hopper_takes(
    q: Tensor, starts: Tensor | None, block_q: int, block_k: int, q_offset: int, causal: bool, full_rows: bool
) -> bool:
    """Whether the Hopper kernel covers the case; what it leaves goes to the portable one."""
    return (
        capability(q.device.index or 0) == (9, 0)
        and q.dtype in HALF
        and q.shape[-1] in (64, 128)
        and (block_q, block_k) == (128, 128)
        # A list that is not causal may take the block in which a sequence ends for a full one.
        and (starts is None or (causal and q_offset == 0))
        and full_rows
    )


@torch.library.custom_op("prunekit::block_sparse_prefill", mutates_args=())
def _prefill(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, partials: Tensor, indices: Tensor,
    mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None, ends: Tensor | None,
    block_q: int, block_k: int, q_offset: int, causal: bool, full_rows: bool, scale: float,
    biases: Tensor | None = None, gates: Tensor | None = None, free: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.device.type != "cpu" or not has_flash():
        return prefill_reference(
            q, k, v, counts, partials, indices, mask_ids, masks, starts, ends, block_q, block_k, q_offset, causal,
            scale, biases, gates, free,
        )  # fmt: skip
    lists = BlockLists(
        counts, partials, indices, mask_ids, masks, block_q, block_k, q.shape[2], k.shape[2], q_offset, causal,
        pairs=0, shortest=int(full_rows), biases=biases,
    )  # fmt: skip
    return cpu.prefill(q, k, v, lists, scale, starts, ends, gates, free)


@_prefill.register_kernel("cuda")
def _prefill_cuda(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, partials: Tensor, indices: Tensor,
    mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None, ends: Tensor | None,
    block_q: int, block_k: int, q_offset: int, causal: bool, full_rows: bool, scale: float,
    biases: Tensor | None = None, gates: Tensor | None = None, free: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if refusal(q, k):
        return prefill_reference(
            q, k, v, counts, partials, indices, mask_ids, masks, starts, ends, block_q, block_k, q_offset, causal,
            scale, biases, gates, free,
        )  # fmt: skip
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    if biases is None and gates is None and hopper_takes(q, starts, block_q, block_k, q_offset, causal, full_rows):
        from prunekit_kernels.block_sparse_prefill import hopper_launch

        return hopper_launch.launch(
            q, k, v, counts, partials, indices, mask_ids, masks, starts, ends, q_offset, causal, scale
        )
    from prunekit_kernels.block_sparse_prefill import portable

    return portable.launch(
        q, k, v, counts, partials, indices, mask_ids, masks, starts, ends, block_q, block_k, q_offset, causal, scale,
        biases=biases, gates=gates, free=free,
    )  # fmt: skip


@_prefill.register_fake
def _prefill_fake(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, partials: Tensor, indices: Tensor,
    mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None, ends: Tensor | None,
    block_q: int, block_k: int, q_offset: int, causal: bool, full_rows: bool, scale: float,
    biases: Tensor | None = None, gates: Tensor | None = None, free: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("prunekit::block_sparse_prefill_backward", mutates_args=())
def _backward(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, counts: Tensor,
    partials: Tensor, indices: Tensor, mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None,
    ends: Tensor | None, biases: Tensor | None, block_q: int, block_k: int, q_offset: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lists = (counts, partials, indices, mask_ids, masks, starts, ends, biases, block_q, block_k, q_offset, causal)
    if refusal(q, k):
        return backward_reference(grad, grad_lse, q, k, v, out, lse, *lists, scale)
    from prunekit_kernels.block_sparse_prefill import backward

    grad, q, k, v, out = _aligned(grad), _aligned(q), _aligned(k), _aligned(v), _aligned(out)
    return backward.launch(grad, grad_lse, q, k, v, out, lse, *lists, scale)


@torch.library.custom_op("prunekit::block_sparse_prefill_gated_backward", mutates_args=())
def _gated_backward(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, counts: Tensor,
    partials: Tensor, indices: Tensor, mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None,
    ends: Tensor | None, biases: Tensor | None, gates: Tensor, block_q: int, block_k: int, q_offset: int,
    causal: bool, scale: float, free: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    lists = (counts, partials, indices, mask_ids, masks, starts, ends, biases, block_q, block_k, q_offset, causal)
    return gated_backward_reference(grad, grad_lse, q, k, v, out, lse, *lists, scale, gates, free)


@_gated_backward.register_fake
def _gated_backward_fake(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, counts: Tensor,
    partials: Tensor, indices: Tensor, mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None,
    ends: Tensor | None, biases: Tensor | None, gates: Tensor, block_q: int, block_k: int, q_offset: int,
    causal: bool, scale: float, free: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = (t.new_empty(t.shape) for t in (q, k, v))
    return (*grads, gates.new_empty(gates.shape))


@_backward.register_fake
def _backward_fake(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, counts: Tensor,
    partials: Tensor, indices: Tensor, mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None,
    ends: Tensor | None, biases: Tensor | None, block_q: int, block_k: int, q_offset: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, counts, partials, indices, mask_ids, masks, starts, ends, *plain, biases, gates, free = inputs
    block_q, block_k, q_offset, causal, _, scale = plain
    ctx.save_for_backward(q, k, v, *output, counts, partials, indices, mask_ids, masks, starts, ends, biases, gates)
    ctx.plain = (block_q, block_k, q_offset, causal, scale)
    ctx.free = free


def _gradients(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *saved, gates = ctx.saved_tensors
    dgates = None
    if gates is None:
        found = _backward(grad, grad_lse, *saved, *ctx.plain)
    else:
        *found, dgates = _gated_backward(grad, grad_lse, *saved, gates, *ctx.plain, ctx.free)
    return (*found, *([None] * 14), dgates, None)


_prefill.register_autograd(_gradients, setup_context=_remember)


def block_sparse_prefill(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, *, scale: float | None = None,
    starts: Tensor | None = None, ends: Tensor | None = None, gates: Tensor | None = None, free_tokens: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention in which each query reads the keys that its block's list names.

    Args:
        q: [B, H, S, D].
        k: [B, G, T, D], G dividing H; `v` alike.
        lists: for S queries and T keys, on the device of `q`.
        scale: factor on the scores, 1 / sqrt(D) if None.
        starts: int32 [B], slot of each sequence's first token (left padding), with `ends`, one past its last. The
            lists then count from the first token; S must equal T. Slots outside give zeros and minus infinity. Where B
            is 1 there may be any number of them: sequences that lie one behind another (varlen). The lists are then for
            the longest.
        gates: float32 [B, G, T], added to all scores of a key (the logarithm of a factor on its weight); minus infinity
            closes it.
        free_tokens: keys less than so many tokens behind a query are read as if they had no gate.
    Returns:
        Output [B, H, S, D] in the dtype of `q` and log-sum-exp float32 [B, H, S] (natural logarithm). Both
        have gradients with respect to `q`, `k`, `v` and `gates`; with gates they are computed in plain torch.
    Raises:
        ValueError: if lists or gates do not fit the tensors, or only one of `starts` and `ends` is given.
    """
    behind = starts is not None and q.shape[0] == 1 and len(starts) > 1
    if starts is not None and len(starts) != q.shape[0] and not behind:
        raise ValueError(f"{len(starts)} sequences do not fit a batch of {q.shape[0]}")
    if not behind and (lists.n_queries, lists.n_keys) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"lists for {lists.n_queries} queries and {lists.n_keys} keys do not fit {q.shape[2]} and {k.shape[2]}"
        )
    if lists.counts.shape[0] not in (1, q.shape[1]):
        raise ValueError(f"lists for {lists.counts.shape[0]} heads do not fit {q.shape[1]} query heads")
    if (starts is None) != (ends is None):
        raise ValueError("`starts` and `ends` go together")
    if starts is not None and q.shape[2] != k.shape[2]:
        raise ValueError("`starts` needs as many queries as keys")
    if gates is not None and (gates.shape != k.shape[:3] or gates.dtype != torch.float32):
        raise ValueError(f"gates {gates.dtype} {list(gates.shape)} do not fit keys {list(k.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _prefill(
        q, k, v, lists.counts, lists.partials, lists.indices, lists.mask_ids, lists.masks, starts, ends,
        lists.block_q, lists.block_k, lists.q_offset, lists.causal, lists.shortest > 0, scale, lists.biases,
        None if gates is None else gates.contiguous(), free_tokens,
    )  # fmt: skip
