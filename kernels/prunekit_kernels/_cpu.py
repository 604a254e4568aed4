"""Attention on a CPU that also gives its log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention by the operation that `scaled_dot_product_attention` calls on a CPU.

    It is called directly because no public operation returns the log-sum-exp. It is private, with the same arguments in
    torch 2.13 and 2.14; a version that changes it fails the contract tests.

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
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = run(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    if mask is not None:
        # The operation says zero there.
        lse = lse.masked_fill(mask.amax(-1) == float("-inf"), float("-inf"))
    return out, lse
