"""The first tokens and a window of recent ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from prunekit.runtime.attention.patterns._checks import at_least


@dataclass(frozen=True)
class SinkWindow:
    """Every query reads the first `sink_tokens` keys and the last `window_tokens` up to itself.

    Args:
        sink_tokens: keys at the start that all later queries read, 0 or more.
        window_tokens: keys up to and including the query's own, 1 or more; on both sides when not causal.
        causal: whether keys after the query are hidden.
    """

    sink_tokens: int = 4
    window_tokens: int = 1024
    causal: bool = True

    paper: ClassVar[tuple[str, str]] = (
        "Efficient Streaming Language Models with Attention Sinks", "https://arxiv.org/abs/2309.17453",
    )  # fmt: skip
    evidence: ClassVar[str] = "text: sinks and window of the paper's section 3"
    deviations: ClassVar[str] = "positions stay absolute; the paper numbers the tokens inside its cache anew"
    status: ClassVar[Literal["preview", "stable"]] = "preview"
    example: ClassVar[dict[str, int]] = {"sink_tokens": 3, "window_tokens": 20}

    def __post_init__(self) -> None:
        at_least(self, sink_tokens=0, window_tokens=1)

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """True where the query at position `q` reads the key at position `k`."""
        distance = q - k
        sink = k < self.sink_tokens
        if self.causal:
            return (distance >= 0) & (sink | (distance < self.window_tokens))
        return sink | (distance.abs() < self.window_tokens)

    def key_ranges(self, first: int, last: int, n_keys: int) -> Iterable[tuple[int, int]]:
        """Sinks and window of the queries from `first` to `last`."""
        end = last + 1 if self.causal else last + self.window_tokens
        return (0, min(self.sink_tokens, end)), (first - self.window_tokens + 1, end)
