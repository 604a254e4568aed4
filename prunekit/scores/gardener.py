"""Gardener: entropy of the values that a unit's weights hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.scores._weights import Weights
    from prunekit.structure.parts import Group


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Gardener:
    """Entropy in nats of the exact values in a unit's weight matrices, pooled; low entropy goes first.

    Weights are rounded to `precision`, equal values counted (+0 and -0 are equal), p(v) = count(v) / all, and the score
    is -sum p(v) ln p(v). Four weights 0.5, 0.5, -1, 2: p = 1/2, 1/4, 1/4, score 1.0397.

    Args:
        precision: number format the weights are rounded to before counting. In float32 nearly every weight of most
            checkpoints is unique, so all units sit at ln(number of weights) and what is left is chance; float16 spreads
            them apart. `float32` sorts, and reads a unit of more than 16 million weights several times.
    """

    precision: Literal["float16", "bfloat16", "float32"] = "float16"

    kinds: ClassVar[tuple[str, ...]] = ("blocks", "sublayers", "attention", "cross_attention", "ffn")
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = "Gardener: entropy of block weights, https://arxiv.org/abs/2602.03918"
    evidence: ClassVar[str] = (
        "code: the authors' notebooks (exact value counts, rank-2 weights pooled, natural logarithm)"
    )
    deviations: ClassVar[str] = (
        "rounds to float16 first (the notebooks count values as stored, which spreads blocks only where those are "
        "float16 values); projections that a model keeps apart (Q, K, V) are pooled like the notebooks' fused one; "
        "sub-layers are ours"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"precision": "float16"}

    def score(self, group: Group, weights: Weights, stats: Mapping[str, Tensor]) -> Tensor:
        """Entropy of each unit, float32 [units], higher = keep; `stats` is not read."""
        import torch

        from prunekit.scores._counts import entropy, value_counts
        from prunekit.scores._weights import matrices, pieces

        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[self.precision]
        found = []
        for refs in group.members:
            readers = [reader for ref in matrices(refs) for reader in pieces(weights, ref)]
            found.append(entropy(value_counts(readers, dtype)))
        return torch.tensor(found, dtype=torch.float32)
