"""Block-sparse prefill as a torch operation: the reference on a CPU, the kernels on a GPU."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from prunekit_kernels.block_sparse_prefill.lists import BlockLists
from prunekit_kernels.block_sparse_prefill.reference import backward_reference, prefill_reference

HALF = (torch.bfloat16, torch.float16)
HEAD_SIZES = (64, 80, 96, 128)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def refusal(q: Tensor, k: Tensor) -> str:
    """Why no kernel takes these tensors, or an empty string if one does."""
    if q.device.type != "cuda":
        return f"the tensors are on `{q.device.type}`, the kernels need a CUDA device"
    if not _has_triton():
        return "triton is not installed"
    if q.dtype not in HALF:
        return f"dtype {q.dtype} is not one of bfloat16, float16"
    if q.shape[-1] not in HEAD_SIZES:
        return f"head size {q.shape[-1]} is not one of {', '.join(map(str, HEAD_SIZES))}"
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key-value heads"
    return ""


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension and, as the copy engine wants, strides and start of 16 bytes."""
    fits = tensor.stride(-1) == 1 and all(s % 8 == 0 for s in tensor.stride()[:-1]) and tensor.data_ptr() % 16 == 0
    return tensor if fits else tensor.contiguous()


def hopper_takes(q: Tensor, starts: Tensor | None, block_q: int, block_k: int, full_rows: bool) -> bool:
    """Whether the Hopper kernel covers the case; what it leaves goes to the portable one."""
    return (
        _capability(q.device.index or 0) == (9, 0)
        and q.dtype in HALF
        and q.shape[-1] in (64, 128)
        and (block_q, block_k) == (128, 128)
        and starts is None
        and full_rows
    )


@torch.library.custom_op("prunekit::block_sparse_prefill", mutates_args=(), device_types="cpu")
def _prefill(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, partials: Tensor, indices: Tensor,
    mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None, ends: Tensor | None,
    block_q: int, block_k: int, q_offset: int, causal: bool, full_rows: bool, scale: float,
    biases: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return prefill_reference(
        q, k, v, counts, partials, indices, mask_ids, masks, starts, ends, block_q, block_k, q_offset, causal, scale,
        biases,
    )  # fmt: skip


@_prefill.register_kernel("cuda")
def _prefill_cuda(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, partials: Tensor, indices: Tensor,
    mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None, ends: Tensor | None,
    block_q: int, block_k: int, q_offset: int, causal: bool, full_rows: bool, scale: float,
    biases: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if refusal(q, k):
        return prefill_reference(
            q, k, v, counts, partials, indices, mask_ids, masks, starts, ends, block_q, block_k, q_offset, causal,
            scale, biases,
        )  # fmt: skip
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    if biases is None and hopper_takes(q, starts, block_q, block_k, full_rows):
        from prunekit_kernels.block_sparse_prefill import hopper_launch

        return hopper_launch.launch(q, k, v, counts, partials, indices, mask_ids, masks, q_offset, causal, scale)
    from prunekit_kernels.block_sparse_prefill import portable

    return portable.launch(
        q, k, v, counts, partials, indices, mask_ids, masks, starts, ends, block_q, block_k, q_offset, causal, scale,
        biases=biases,
    )  # fmt: skip


@_prefill.register_fake
def _prefill_fake(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, partials: Tensor, indices: Tensor,
    mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None, ends: Tensor | None,
    block_q: int, block_k: int, q_offset: int, causal: bool, full_rows: bool, scale: float,
    biases: Tensor | None = None,
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


@_backward.register_fake
def _backward_fake(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, counts: Tensor,
    partials: Tensor, indices: Tensor, mask_ids: Tensor | None, masks: Tensor | None, starts: Tensor | None,
    ends: Tensor | None, biases: Tensor | None, block_q: int, block_k: int, q_offset: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, counts, partials, indices, mask_ids, masks, starts, ends, *plain, biases = inputs
    block_q, block_k, q_offset, causal, _, scale = plain
    ctx.save_for_backward(q, k, v, *output, counts, partials, indices, mask_ids, masks, starts, ends, biases)
    ctx.plain = (block_q, block_k, q_offset, causal, scale)


def _gradients(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward(grad, grad_lse, *ctx.saved_tensors, *ctx.plain)
    return (*found, *([None] * 14))


_prefill.register_autograd(_gradients, setup_context=_remember)


def block_sparse_prefill(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, *, scale: float | None = None,
    starts: Tensor | None = None, ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention in which each query reads the keys that its block's list names.

    Args:
        q: [B, H, S, D].
        k: [B, G, T, D], G dividing H; `v` alike.
        lists: for S queries and T keys, on the device of `q`.
        scale: factor on the scores, 1 / sqrt(D) if None.
        starts: int32 [B], slot of each sequence's first token (left padding), with `ends`, one past its last. The
            lists then count from the first token; S must equal T. Slots outside give zeros and minus infinity.
    Returns:
        Output [B, H, S, D] in the dtype of `q` and log-sum-exp float32 [B, H, S] (natural logarithm). Both
        have gradients with respect to `q`, `k` and `v`.
    Raises:
        ValueError: if the lists do not fit the tensors, or only one of `starts` and `ends` is given.
    """
    if (lists.n_queries, lists.n_keys) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"lists for {lists.n_queries} queries and {lists.n_keys} keys do not fit {q.shape[2]} and {k.shape[2]}"
        )
    if lists.counts.shape[0] not in (1, q.shape[1]):
        raise ValueError(f"lists for {lists.counts.shape[0]} heads do not fit {q.shape[1]} query heads")
    if (starts is None) != (ends is None):
        raise ValueError("`starts` and `ends` go together")
    if starts is not None and q.shape[2] != k.shape[2]:
        raise ValueError("`starts` needs as many queries as keys")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _prefill(
        q, k, v, lists.counts, lists.partials, lists.indices, lists.mask_ids, lists.masks, starts, ends,
        lists.block_q, lists.block_k, lists.q_offset, lists.causal, lists.shortest > 0, scale, lists.biases,
    )  # fmt: skip
