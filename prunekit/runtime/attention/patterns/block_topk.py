"""Blocks whose mean key has the highest product with the block's mean query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from prunekit.runtime.attention.patterns._checks import at_least
from prunekit.runtime.attention.patterns._scored import BLOCK
from prunekit_kernels.block_scores import scored_lists
from prunekit_kernels.block_sparse_prefill import BlockLists
from prunekit_kernels.page_summaries import block_means


@dataclass(frozen=True)
class BlockTopk:
    """Every block of 128 queries reads the `keep_blocks` blocks of 128 keys with the highest score, by head.

    The score is the product of the means. The first `sink_blocks` and the last `window_blocks` are always read and
    count. A step reads pages of 128 tokens, chosen by the best product of their mean key with the query heads.

    Args:
        keep_blocks: blocks that are read, 1 or more.
        sink_blocks: first blocks that are always read, 0 or more.
        window_blocks: last blocks that are always read, the query's own counted, 1 or more.
    """

    keep_blocks: int = 16
    sink_blocks: int = 1
    window_blocks: int = 1

    causal: ClassVar[bool] = True
    paper: ClassVar[tuple[str, str]] = (
        "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        "https://arxiv.org/abs/2407.02490",
    )
    evidence: ClassVar[str] = "text: the block-sparse head of the paper, mean-pooled queries and keys, top blocks"
    deviations: ClassVar[str] = "blocks of 128 instead of 64; all heads; a sink; steps choose pages the same way"
    status: ClassVar[Literal["preview", "stable"]] = "preview"
    example: ClassVar[dict[str, int]] = {"keep_blocks": 2}

    def __post_init__(self) -> None:
        at_least(self, keep_blocks=1, sink_blocks=0, window_blocks=1)

    @property
    def pages(self) -> tuple[int, int]:
        """Tokens of a page and pages that a step keeps."""
        return BLOCK, self.keep_blocks

    def prompt_lists(self, q: Tensor, k: Tensor, scale: float) -> BlockLists | None:
        """Top blocks of each row and head."""
        mine = block_means(q, BLOCK)[0].unflatten(0, (k.shape[1], -1))
        scores = mine @ block_means(k, BLOCK)[0].transpose(1, 2)[:, None]
        return scored_lists(
            scores.flatten(0, 1), q.shape[2], k.shape[2], keep=self.keep_blocks, sink=self.sink_blocks,
            window=self.window_blocks,
        )  # fmt: skip

    def summaries(self, k: Tensor) -> tuple[Tensor, ...]:
        """Mean key of each page."""
        return (block_means(k, BLOCK),)

    def page_scores(self, q: Tensor, summaries: tuple[Tensor, ...]) -> Tensor:
        """Product of the query with each page's mean key, of the query heads of a key-value head the largest."""
        (means,) = summaries
        mine = q.squeeze(2).unflatten(1, (means.shape[1], -1))
        return (mine @ means.transpose(2, 3)).float().amax(2)
