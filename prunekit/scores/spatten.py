"""SpAtten: how loud a head speaks, over all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.scores._weights import Weights
    from prunekit.structure.parts import Group


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Spatten:
    """Mean absolute output of a head before the output projection, over tokens and the head's channels.

    A KV group counts all its query heads. The outputs 1, -3 of a head of width 2 score 2.
    """

    kinds: ClassVar[tuple[str, ...]] = ("kv_groups", "query_heads")
    needs: ClassVar[tuple[str, ...]] = ("projection",)
    paper: ClassVar[str] = (
        "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning, "
        "https://arxiv.org/abs/2012.09852"
    )
    evidence: ClassVar[str] = "text: the head importance, a sum of absolute outputs, from a reader's review"
    deviations: ClassVar[str] = (
        "a static average over calibration data instead of a choice at run time; scores are not carried on from layer "
        "to layer; a mean instead of a sum"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {}

    def score(self, group: Group, weights: Weights, stats: Mapping[str, Tensor]) -> Tensor:
        """Score of each unit, float32 [units], higher = keep; reads `projection/size/<sub-layer>`."""
        from prunekit.core.errors import StructureError
        from prunekit.scores._weights import by_axis

        if group.output is None:
            raise StructureError(f"`{group.address}` has no single output projection")
        sizes = stats[f"projection/size/{group.address.rpartition('.')[0]}"]
        side = next(dim for dim in group.output.layout if dim != ("hidden",))
        return by_axis(sizes, (side,), group.axis, group.sizes).mean(dim=1).float()
