"""The first blocks and the last ones: sinks and window in whole blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from prunekit.runtime.attention.patterns._checks import at_least


@dataclass(frozen=True)
class Streaming:
    """Every query reads the first `sink_blocks` blocks and the last `window_blocks` up to its own.

    `sink_window` with its borders moved to those of blocks: no mask inside blocks but causality, so every kernel takes
    it, and decode reads whole pages.

    Args:
        block_tokens: tokens of a block, 1 or more.
        sink_blocks: blocks at the start that all later queries read, 0 or more.
        window_blocks: near blocks, the query's own counted, 1 or more.
    """

    block_tokens: int = 128
    sink_blocks: int = 1
    window_blocks: int = 8

    causal: ClassVar[bool] = True
    paper: ClassVar[tuple[str, str]] = (
        "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        "https://arxiv.org/abs/2410.10819",
    )
    evidence: ClassVar[str] = "text: the streaming heads of the paper, sinks and recent tokens in blocks"
    deviations: ClassVar[str] = "all heads of a layer stream; the paper keeps some heads of it dense"
    status: ClassVar[Literal["preview", "stable"]] = "preview"
    example: ClassVar[dict[str, int]] = {"block_tokens": 16, "window_blocks": 2}

    def __post_init__(self) -> None:
        at_least(self, block_tokens=1, sink_blocks=0, window_blocks=1)

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """True where the query at position `q` reads the key at position `k`."""
        k_block = k // self.block_tokens
        near = (q // self.block_tokens - k_block < self.window_blocks) | (k_block < self.sink_blocks)
        return near & (k <= q)

    def key_ranges(self, first: int, last: int, n_keys: int) -> Iterable[tuple[int, int]]:
        """Sinks and window of the queries from `first` to `last`."""
        size = self.block_tokens
        yield 0, min(self.sink_blocks * size, last + 1)
        yield (first // size - self.window_blocks + 1) * size, last + 1
