"""A window that skips: every so many tokens, far back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from prunekit.runtime.attention.patterns._checks import at_least


@dataclass(frozen=True)
class Dilated:
    """Every query reads `window_tokens` keys that lie `dilation` tokens apart, its own the last of them.

    Args:
        window_tokens: keys read, 1 or more; on both sides when not causal.
        dilation: distance between them, 1 or more; 1 is a plain window.
        causal: whether keys after the query are hidden.
    """

    window_tokens: int = 512
    dilation: int = 2
    causal: bool = True

    paper: ClassVar[tuple[str, str]] = (
        "Longformer: The Long-Document Transformer", "https://arxiv.org/abs/2004.05150",
    )  # fmt: skip
    evidence: ClassVar[str] = "text: the dilated sliding window of section 3.1"
    deviations: ClassVar[str] = "causal by default; one dilation for all heads"
    status: ClassVar[Literal["preview", "stable"]] = "preview"
    example: ClassVar[dict[str, int]] = {"window_tokens": 8, "dilation": 3}

    def __post_init__(self) -> None:
        at_least(self, window_tokens=1, dilation=1)

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """True where the query at position `q` reads the key at position `k`."""
        distance = q - k
        near = (distance.abs() < self.window_tokens * self.dilation) & (distance % self.dilation == 0)
        return near & (distance >= 0) if self.causal else near

    def key_ranges(self, first: int, last: int, n_keys: int) -> Iterable[tuple[int, int]]:
        """The span of the window of the queries from `first` to `last`."""
        reach = (self.window_tokens - 1) * self.dilation
        return ((first - reach, last + 1 + (0 if self.causal else reach)),)
