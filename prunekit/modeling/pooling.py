"""Sentence embeddings out of hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over positions that are not padding [sequences, width], in the type of `hidden`; 0 where all is padding.

    Args:
        hidden: [sequences, positions, width].
        mask: int64 or bool [sequences, positions], 0 where the input is padding.
    """
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
