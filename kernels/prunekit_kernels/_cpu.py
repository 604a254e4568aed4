"""Attention on a CPU that also gives its log-sum-exp."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

# What `scaled_dot_product_attention` calls on a CPU. It is private; no public operation returns the log-sum-exp.
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
_ARGUMENTS = ["query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"]


@functools.cache
def has_flash() -> bool:
    """Whether this torch has the operation with the arguments it has in torch 2.13 and 2.14; says once if not."""
    found = getattr(torch.ops.aten, FLASH, None)
    known = found is not None and [a.name for a in found.default._schema.arguments] == _ARGUMENTS
    if not known:
        why = f"torch {torch.__version__} has no `{FLASH}` as known"
        warnings.warn(f"sparse attention on a CPU runs as slow as its references: {why}", stacklevel=2)
    return known


def flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention by the operation that `has_flash` is about.

    Args:
        q: [B, H, S, D], float32 or float64.
        k: [B, H, T, D] of the same type, possibly expanded; `v` alike.
        scale: factor on the scores.
        causal: whether query i reads keys up to i alone.
        mask: [B or 1, H or 1, S, T] of the same type, added to the scores.
    Returns:
        Output [B, H, S, D] and log-sum-exp [B, H, S] (natural logarithm). A query that reads no key gives zeros and
        minus infinity.
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out, lse = getattr(torch.ops.aten, FLASH)(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    if mask is not None:
        # The operation says zero there.
        lse = lse.masked_fill(mask.amax(-1) == float("-inf"), float("-inf"))
    return out, lse
