"""Blocks that hold most of the attention mass, estimated from antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from prunekit.core.errors import UsageError
from prunekit.runtime.attention.patterns._checks import at_least
from prunekit.runtime.attention.patterns._scored import BLOCK, DenseSteps
from prunekit_kernels.block_scores import antidiagonal_scores, scored_lists
from prunekit_kernels.block_sparse_prefill import BlockLists


@dataclass(frozen=True)
class Antidiagonal(DenseSteps):
    """Every block of 128 queries reads the fewest blocks that reach `mass` of its estimated attention; steps are dense.

    One in `stride` products is computed, those on the antidiagonals of squares of `stride` by `stride`, and their
    softmax summed over blocks. The first block and the query's own are always read.

    With `query_step`, one in so many runs of `stride` queries speaks for its block, the last of each: scoring costs so
    many times less, and what the other queries alone look for is not seen. The last run of a prompt is always scored.

    Args:
        mass: share of a row's estimated attention that is reached, above 0 and at most 1.
        stride: 2, 4, 8, 16, 32, 64 or 128; larger is cheaper and coarser.
        keep_blocks: read so many blocks instead, whatever their mass; 0 leaves it to `mass`.
        query_step: runs of queries of which one is scored, a power of two; at most 128 with `stride` multiplied.
    """

    mass: float = 0.9
    stride: int = 16
    keep_blocks: int = 0
    query_step: int = 1

    causal: ClassVar[bool] = True
    paper: ClassVar[tuple[str, str]] = (
        "XAttention: Block Sparse Attention with Antidiagonal Scoring", "https://arxiv.org/abs/2503.16428",
    )  # fmt: skip
    evidence: ClassVar[str] = (
        "text and code: folded scores, softmax, sums over blocks of 128, mass of 0.9, stride 8 or 16"
    )
    deviations: ClassVar[str] = (
        "one threshold for all heads; `keep_blocks` and `query_step` are additions: the paper scores all queries"
    )
    status: ClassVar[Literal["preview", "stable"]] = "preview"
    example: ClassVar[dict[str, float]] = {"mass": 0.8, "stride": 8}

    def __post_init__(self) -> None:
        at_least(self, stride=2, keep_blocks=0, query_step=1)
        if BLOCK % self.stride:
            raise UsageError(f"`stride: {self.stride}` does not divide blocks of {BLOCK}")
        if BLOCK % (self.stride * self.query_step):
            raise UsageError(
                f"`query_step: {self.query_step}` with `stride: {self.stride}` does not divide blocks of {BLOCK}",
                why="each block of queries needs a run that is scored",
                hint=f"powers of two up to {BLOCK // self.stride}",
            )
        if not 0 < self.mass <= 1:
            raise UsageError(f"`mass: {self.mass}` is no share", why="it is above 0 and at most 1")

    def prompt_lists(self, q: Tensor, k: Tensor, scale: float) -> BlockLists | None:
        """Blocks of each row and head by estimated mass."""
        scores = antidiagonal_scores(
            q, k, stride=self.stride, step=self.query_step, q_offset=k.shape[2] - q.shape[2], scale=scale
        )
        mass = 0.0 if self.keep_blocks else self.mass
        return scored_lists(scores[0], q.shape[2], k.shape[2], keep=self.keep_blocks, mass=mass)
