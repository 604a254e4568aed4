"""Last k: depth alone, the baseline that every score of blocks has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.scores._weights import Weights
    from prunekit.structure.parts import Group


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LastK:
    """Position from the end; the deepest go first, except the very last when told so.

    Args:
        keep_last: units at the end that go after all others. 1 is the simple rule of Gromov et al. for blocks.
    """

    keep_last: Annotated[int, Field(ge=0, strict=True)] = 0

    kinds: ClassVar[tuple[str, ...]] = ("blocks", "sublayers", "attention", "cross_attention", "ffn")
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = "The Unreasonable Ineffectiveness of the Deeper Layers, https://arxiv.org/abs/2403.17887"
    evidence: ClassVar[str] = "text: the paper's simple rule drops the deepest blocks except the last"
    deviations: ClassVar[str] = "keeps none of the last units unless told so"
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"keep_last": 1}

    def score(self, group: Group, weights: Weights, stats: Mapping[str, Tensor]) -> Tensor:
        """Units that come after, float32 [units], higher = keep; reads neither weights nor statistics.

        Five units score 4, 3, 2, 1, 0; with keep_last 1 they score 4, 3, 2, 1, 5.
        """
        import torch

        n = len(group.units)
        scores = torch.arange(n - 1, -1, -1, dtype=torch.float32)
        scores[max(0, n - self.keep_last) :] += n
        return scores
