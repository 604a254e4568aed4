"""Column statistics as a torch operation: the reference on a CPU, the kernel on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit_kernels._device import HALF, no_head_size, no_kernels
from prunekit_kernels.column_stats.reference import stats_reference


def refusal(q: Tensor, k: Tensor) -> str:
    """Why no kernel takes these tensors, or an empty string if one does."""
    if reason := no_kernels(q):
        return reason
    if q.dtype not in HALF or k.dtype != q.dtype:
        return f"dtypes {q.dtype} and {k.dtype} are not both bfloat16 or both float16"
    if reason := no_head_size(q):
        return reason
    return ""


@torch.library.custom_op("prunekit::column_stats", mutates_args=())
def _stats(
    q: Tensor, k: Tensor, lse: Tensor, starts: Tensor | None, ends: Tensor | None, q_offset: int, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if refusal(q, k):
        return stats_reference(q, k, lse, starts, ends, q_offset, causal, scale)
    from prunekit_kernels.column_stats import portable

    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    return portable.launch(q, k, lse, starts, ends, q_offset, causal, scale)


@_stats.register_fake
def _stats_fake(
    q: Tensor, k: Tensor, lse: Tensor, starts: Tensor | None, ends: Tensor | None, q_offset: int, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sums = q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)
    return sums, torch.empty_like(sums)


def column_stats(
    q: Tensor, k: Tensor, lse: Tensor, *, q_offset: int | None = None, causal: bool = True,
    scale: float | None = None, starts: Tensor | None = None, ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum and largest of each key's attention probabilities over the queries.

    Args:
        q: [B, H, S, D]; the last W queries of a prompt are asked by handing over those alone.
        k: [B, G, T, D], G dividing H.
        lse: log-sum-exp of each query over the keys that it reads, [B, H, S], natural logarithm, as the attention
            operations here return it; minus infinity for a query that reads nothing.
        q_offset: position of the first query among the keys; T - S if None.
        causal: whether keys after the query are hidden.
        scale: factor on the scores, 1 / sqrt(D) if None.
        starts: int32 [B], slot of each sequence's first key (left padding), with `ends`, one past its last; queries and
            keys outside give and get nothing.
    Returns:
        Two float32 tensors [B, H, T]: sums over the queries, and largest values. No gradient.
    Raises:
        ValueError: if the shapes do not fit each other, or only one of `starts` and `ends` is given.
    """
    batch, heads, n_queries, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim or heads % k.shape[1] or lse.shape != q.shape[:3]:
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, lse))
        raise ValueError(f"queries, keys and sums {shapes} do not fit each other")
    if (starts is None) != (ends is None):
        raise ValueError("`starts` and `ends` go together")
    offset = k.shape[2] - n_queries if q_offset is None else q_offset
    return _stats(q, k, lse.float(), starts, ends, offset, causal, dim**-0.5 if scale is None else scale)
