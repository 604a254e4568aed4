"""Every key: for comparing the runtime with plain attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """Every query reads every key, up to its own when causal.

    Args:
        causal: whether keys after the query are hidden.
    """

    causal: bool = True

    paper: ClassVar[tuple[str, str]] = ("Attention Is All You Need", "https://arxiv.org/abs/1706.03762")
    evidence: ClassVar[str] = "text: plain attention"
    deviations: ClassVar[str] = ""
    status: ClassVar[Literal["preview", "stable"]] = "preview"
    example: ClassVar[dict[str, bool]] = {}

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """True where the query at position `q` reads the key at position `k`."""
        return (k <= q) if self.causal else (k >= 0) & (q >= 0)

    def key_ranges(self, first: int, last: int, n_keys: int) -> Iterable[tuple[int, int]]:
        """All keys up to `last`, or all of them."""
        return ((0, last + 1 if self.causal else n_keys),)
