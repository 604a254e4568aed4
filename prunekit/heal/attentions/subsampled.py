"""Stochastically subsampled attention: each layer reads another random part of the tokens at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Subsampled:
    """Trains with attention that reads a random part of the tokens before; the trained model reads all of them.

    Each layer draws anew in each pass. A part of what it keeps is a sample of all positions, the same for every head
    and query; the other is a block of neighbours around each query, whose borders are drawn too. Tokens after a query
    are never read, and each reads itself. The last steps are dense. The figures of the paper could not be reached and
    its sampler is not published: this is a reading of its abstract, at half precision of evidence.

    Args:
        keep: fraction of the positions that a layer keeps for each query.
        local: share of them that are neighbours.
        dense_end: fraction of the steps, the last ones, with all positions.
    """

    keep: float = Field(default=0.25, gt=0, lt=1)
    local: float = Field(default=0.5, gt=0, le=1)
    dense_end: float = Field(default=0.1, ge=0, lt=1)

    needs: ClassVar[tuple[str, ...]] = ("text",)
    paper: ClassVar[str] = (
        "The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles, https://arxiv.org/abs/2306.01705"
    )
    evidence: ClassVar[str] = (
        "half precision: abstract and project page (random part in training, unbiased or near tokens preferred, a "
        "short dense end, 4 to 8 times less attention); sampler, window and schedule inferred"
    )
    deviations: ClassVar[str] = (
        "one draw serves unbiased and local sampling by shares of what is kept; one draw for all sequences of a pass; "
        "a query always reads itself; no ensemble of drawn passes when the model is used"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"keep": 0.25}

    def sizes(self, tokens: int) -> tuple[int, int]:
        """Tokens in a block, a divisor of all tokens, and in the sample."""
        wanted = max(1, round(tokens * self.keep * self.local))
        block = next(size for size in range(wanted, 0, -1) if tokens % size == 0)
        return block, max(0, round(tokens * self.keep) - block)

    def check(self, length_tokens: int) -> None:
        """Fails for sequences whose length has no fitting divisor.

        Raises:
            UsageError: if blocks of neighbours would be less than half as long as asked for.
        """
        block, _ = self.sizes(length_tokens)
        wanted = length_tokens * self.keep * self.local
        if block < wanted / 2:
            raise UsageError(
                f"sequences of {length_tokens} tokens split into blocks of {block}, {wanted:.0f} are asked for",
                hint="set `heal.length_tokens` to a multiple of a power of two",
            )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention [B, H, T, D] of a causal model over a part that is drawn now, by torch's own state."""
        import torch

        from prunekit.heal.attentions._grouped import Groups, attend

        tokens, device = query.shape[2], query.device
        block, sample = self.sizes(tokens)
        at = torch.arange(tokens, device=device)
        border = torch.randint(block, (1,), device=device)
        shared = torch.randperm(tokens, device=device)[:sample]
        # The first block begins at `border`; what lies before it shares a group with the end of the sequence, apart.
        groups = Groups((at + border) % tokens, (at < border).long(), shared, block)
        return attend(query, key, value, groups, scaling)
