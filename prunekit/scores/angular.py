"""Angular distance (Gromov et al.): how far a run of blocks turns the last token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.scores._weights import Weights
    from prunekit.structure.parts import Group


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Angular:
    """Smallest angular distance, at the last token, over the runs of `span` blocks that hold a block.

    A run's distance is arccos(cos(x, y)) / pi between its input x and output y, averaged over sequences. With `span`
    equal to the number of blocks removed, the lowest scores are the blocks of the paper's best run, all at its
    distance. With span 1 each block stands for itself. Distances 0.3, 0.1, 0.2 of the runs (0, 1), (1, 2), (2, 3) score
    blocks 0 to 3 as 0.3, 0.1, 0.1, 0.2.

    Args:
        span: blocks in a run, at least 1.
    """

    span: Annotated[int, Field(ge=1, strict=True)] = 1

    kinds: ClassVar[tuple[str, ...]] = ("blocks",)
    needs: ClassVar[tuple[str, ...]] = ("angle",)
    paper: ClassVar[str] = "The Unreasonable Ineffectiveness of the Deeper Layers, https://arxiv.org/abs/2403.17887"
    evidence: ClassVar[str] = "inferred: the published definition (last token, arccos over pi, one contiguous run)"
    deviations: ClassVar[str] = "the best run is expressed as scores of its blocks; no healing"
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"span": 1}

    def score(self, group: Group, weights: Weights, stats: Mapping[str, Tensor]) -> Tensor:
        """Distance of each block's best run in [0, 1], float32 [units], higher = keep; reads `angle/blocks`.

        Raises:
            UsageError: when `span` exceeds the number of blocks.
        """
        import torch

        n = len(group.units)
        if self.span > n:
            raise UsageError(f"`span: {self.span}` is longer than the model", why=f"it has {n} blocks")
        runs = stats["angle/blocks"].diagonal(self.span).float()
        return torch.stack([runs[max(0, i - self.span + 1) : i + 1].min() for i in range(n)])
