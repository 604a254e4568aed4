"""Near blocks, blocks at power-of-two distances, and the first block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from prunekit.runtime.attention.patterns._checks import at_least


@dataclass(frozen=True)
class Power:
    """Every query reads the last `window_blocks` blocks, the blocks 1, 2, 4, 8, ... back, and the first `sink_blocks`.

    With d blocks between query and key, the key is read if it is not in the future and d < window_blocks, or d is a
    power of two, or the key's block is one of the first. Any distance is a sum of few powers of two, so information
    travels from any token to any later one within log2(blocks) layers.

    Args:
        block_tokens: tokens of a block, 1 or more.
        window_blocks: near blocks, the query's own counted, 1 or more.
        sink_blocks: blocks at the start that all later queries read, 0 or more.
    """

    block_tokens: int = 256
    window_blocks: int = 5
    sink_blocks: int = 1

    causal: ClassVar[bool] = True
    paper: ClassVar[tuple[str, str]] = (
        "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
        "https://arxiv.org/abs/2503.03588",
    )
    evidence: ClassVar[str] = "text: the mask of the paper's appendix, block 256, five near blocks, one sink block"
    deviations: ClassVar[str] = ""
    status: ClassVar[Literal["preview", "stable"]] = "preview"
    example: ClassVar[dict[str, int]] = {"block_tokens": 16, "window_blocks": 2}

    def __post_init__(self) -> None:
        at_least(self, block_tokens=1, window_blocks=1, sink_blocks=0)

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """True where the query at position `q` reads the key at position `k`."""
        k_block = k // self.block_tokens
        blocks = q // self.block_tokens - k_block
        near = (blocks < self.window_blocks) | ((blocks & (blocks - 1)) == 0) | (k_block < self.sink_blocks)
        return near & (k <= q)

    def key_ranges(self, first: int, last: int, n_keys: int) -> Iterable[tuple[int, int]]:
        """Sinks, window and the blocks at each power of two, of the queries from `first` to `last`."""
        size = self.block_tokens
        low, high = first // size, last // size
        yield 0, min(self.sink_blocks * size, last + 1)
        yield (low - self.window_blocks + 1) * size, last + 1
        distance = 1
        while distance <= high:
            yield (low - distance) * size, (high - distance + 1) * size
            distance *= 2
