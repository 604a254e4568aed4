"""Pages whose largest possible product with the query is high."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from prunekit.core.errors import UsageError
from prunekit.runtime.attention.patterns._checks import at_least
from prunekit_kernels.block_sparse_prefill import BlockLists
from prunekit_kernels.page_summaries import page_bounds, page_scores


@dataclass(frozen=True)
class Quest:
    """A step reads the `budget_tokens / page_tokens` pages with the highest bound; prompts are dense.

    The bound is the sum over channels of the larger of query times smallest and query times largest key value of the
    page. The page of the newest token is always read.

    Args:
        page_tokens: tokens of a page, 1 or more.
        budget_tokens: tokens that a step reads, a multiple of `page_tokens`.
    """

    page_tokens: int = 16
    budget_tokens: int = 2048

    causal: ClassVar[bool] = True
    paper: ClassVar[tuple[str, str]] = (
        "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", "https://arxiv.org/abs/2406.10774",
    )  # fmt: skip
    evidence: ClassVar[str] = "text and code: pages of 16, bounds by channel, top pages by budget"
    deviations: ClassVar[str] = (
        "pages are chosen by key-value head, by the best bound of its query heads; the paper, without grouped heads, "
        "chooses by head and keeps the first two layers dense, here the `layers` option"
    )
    status: ClassVar[Literal["preview", "stable"]] = "preview"
    example: ClassVar[dict[str, int]] = {"page_tokens": 4, "budget_tokens": 24}

    def __post_init__(self) -> None:
        at_least(self, page_tokens=1)
        at_least(self, budget_tokens=self.page_tokens)
        if self.budget_tokens % self.page_tokens:
            raise UsageError(f"`budget_tokens: {self.budget_tokens}` is no multiple of pages of {self.page_tokens}")

    @property
    def pages(self) -> tuple[int, int]:
        """Tokens of a page and pages that a step keeps."""
        return self.page_tokens, self.budget_tokens // self.page_tokens

    def prompt_lists(self, q: Tensor, k: Tensor, scale: float) -> BlockLists | None:
        """None: prompts are dense."""
        return None

    def summaries(self, k: Tensor) -> tuple[Tensor, ...]:
        """Smallest and largest values of each page."""
        return page_bounds(k, self.page_tokens)

    def page_scores(self, q: Tensor, summaries: tuple[Tensor, ...]) -> Tensor:
        """The bounds: positive query values meet the largest key values, negative ones the smallest."""
        return page_scores(q, *summaries)
