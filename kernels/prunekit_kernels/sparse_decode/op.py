"""Sparse decode as a torch operation: gathered tokens on a CPU, kernels on CUDA, the reference elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit_kernels._cpu import has_flash
from prunekit_kernels._device import HALF, capability, multiprocessors, no_head_size, no_kernels
from prunekit_kernels.sparse_decode import cpu
from prunekit_kernels.sparse_decode.chunks import Chunks, cluster_chunks
from prunekit_kernels.sparse_decode.lists import PageLists
from prunekit_kernels.sparse_decode.reference import decode_reference

MAX_ROWS = 64
# Query heads of a key-value head in the Hopper kernel, and tokens of which its chunks are multiples.
HOPPER_GROUP, HOPPER_STEP = 8, 64


def refusal(q: Tensor, k: Tensor, v: Tensor, kv_heads: int) -> str:
    """Why no kernel takes these tensors, or an empty string if one does."""
    if reason := no_kernels(q):
        return reason
    if q.dtype not in HALF:
        return f"dtype {q.dtype} is not one of bfloat16, float16"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"the cache is {k.dtype} and {v.dtype}, the queries are {q.dtype}"
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        return "the last dimension of the cache is not contiguous"
    if reason := no_head_size(q):
        return reason
    rows = q.shape[1] // kv_heads * q.shape[2]
    if rows > MAX_ROWS:
        return f"{rows} queries of one key-value head are more than {MAX_ROWS}"
    return ""


def hopper_chunks(
    q: Tensor, k: Tensor, v: Tensor, kv_heads: int, page_tokens: int, paged: bool, longest: int
) -> Chunks | None:
    """How the Hopper kernel cuts a step that it takes faster than the portable one, else None."""
    batch, heads, queries, dim = q.shape
    device = q.device.index or 0
    taken = (
        capability(device) == (9, 0)
        and dim in (64, 128)
        and queries == 1
        and heads // kv_heads <= HOPPER_GROUP
        and k.stride() == v.stride()
        # Tokens are copied 16 bytes at a time.
        and all(s % 16 == 0 for s in k.stride()[:-1])
        and k.data_ptr() % 16 == v.data_ptr() % 16 == 0
        # A page begins where the one before ends.
        and (not paged or k.stride(0) == page_tokens * k.stride(1))
    )
    return cluster_chunks(batch * kv_heads, longest, HOPPER_STEP, multiprocessors(device)) if taken else None


@torch.library.custom_op("prunekit::sparse_decode", mutates_args=())
def _decode(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, starts: Tensor, tokens: Tensor,
    page_tokens: int, paged: bool, longest: int, total: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.device.type == "cpu" and bool((tokens > longest).any()):
        raise ValueError(f"a list of {int(tokens.max())} tokens is longer than `longest`, which is {longest}")
    if q.device.type != "cpu" or not has_flash():
        return decode_reference(q, k, v, indices, starts, tokens, page_tokens, paged, scale)
    return cpu.decode(q, k, v, indices, starts, tokens, page_tokens, paged, scale)


@_decode.register_kernel("cuda")
def _decode_cuda(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, starts: Tensor, tokens: Tensor,
    page_tokens: int, paged: bool, longest: int, total: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if refusal(q, k, v, starts.shape[1]):
        return decode_reference(q, k, v, indices, starts, tokens, page_tokens, paged, scale)
    q = q if q.stride(-1) == 1 else q.contiguous()
    if chunks := hopper_chunks(q, k, v, starts.shape[1], page_tokens, paged, longest):
        from prunekit_kernels.sparse_decode import hopper_launch

        return hopper_launch.launch(q, k, v, indices, starts, tokens, page_tokens, paged, chunks, scale)
    from prunekit_kernels.sparse_decode import portable

    return portable.launch(q, k, v, indices, starts, tokens, page_tokens, paged, longest, total, scale)


@_decode.register_fake
def _decode_fake(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, starts: Tensor, tokens: Tensor,
    page_tokens: int, paged: bool, longest: int, total: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _mismatch(q: Tensor, k: Tensor, v: Tensor, lists: PageLists) -> str:
    """What does not fit between tensors and lists, or an empty string."""
    batch, heads, _, dim = q.shape
    kv_heads = lists.starts.shape[1]
    for name, tensor in (("indices", lists.indices), ("starts", lists.starts), ("tokens", lists.tokens)):
        if tensor.dtype != torch.int32 or tensor.device != q.device:
            return f"`{name}` is {tensor.dtype} on `{tensor.device}`, wanted int32 on `{q.device}`"
    if k.shape != v.shape or k.shape[-1] != dim:
        return f"keys {list(k.shape)}, values {list(v.shape)} and head size {dim} do not fit each other"
    if lists.starts.shape[0] != batch or lists.tokens.shape != lists.starts.shape:
        return f"lists for {list(lists.starts.shape)} and {list(lists.tokens.shape)} do not fit {batch} sequences"
    if heads % kv_heads:
        return f"{heads} query heads are not a multiple of {kv_heads} key-value heads"
    if lists.paged and (k.shape[1] != lists.page_tokens or k.shape[2] not in (1, kv_heads)):
        return f"cache {list(k.shape)} does not hold pages of {lists.page_tokens} tokens for {kv_heads} key-value heads"
    if not lists.paged and (k.shape[0] != batch or k.shape[1] != kv_heads):
        return f"cache {list(k.shape)} does not hold {batch} sequences of {kv_heads} key-value heads"
    return ""


def sparse_decode(
    q: Tensor, k: Tensor, v: Tensor, lists: PageLists, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention in which the last tokens of each sequence read the cached tokens that their head's list names.

    Args:
        q: [B, H, Q, D], one or a few queries a sequence. Query i of Q leaves out the last Q - 1 - i listed tokens.
        k: contiguous cache [B, G, S, D], or paged cache [P, page_tokens, G, D] if `lists.paged`, G dividing H. A paged
            cache [P, page_tokens, 1, D] is one pool from which each key-value head's list takes pages of its own.
            `v` alike.
        lists: on the device of `q`.
        scale: factor on the scores, 1 / sqrt(D) if None.
    Returns:
        Output [B, H, Q, D] in the dtype of `q` and log-sum-exp float32 [B, H, Q] (natural logarithm), both contiguous.
        A query that reads no token gives zeros and minus infinity. No gradient.
    Raises:
        ValueError: if lists and tensors do not fit each other.
    """
    if problem := _mismatch(q, k, v, lists):
        raise ValueError(problem)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _decode(
        q, k, v, lists.indices, lists.starts, lists.tokens,
        lists.page_tokens, lists.paged, lists.longest, lists.total, scale,
    )  # fmt: skip
