"""Block influence (ShortGPT): how far a unit turns the hidden states."""

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
class BlockInfluence:
    """How far a unit turns the hidden states: one minus the mean cosine between before and after, over all tokens."""

    kinds: ClassVar[tuple[str, ...]] = ("blocks", "sublayers", "attention", "ffn")
    needs: ClassVar[tuple[str, ...]] = ("cosine",)
    paper: ClassVar[str] = (
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, https://arxiv.org/abs/2403.03853"
    )
    evidence: ClassVar[str] = "inferred: the published definition 1 - E[cos(h_in, h_out)], mean over tokens"
    deviations: ClassVar[str] = "sub-layers are ours; padding does not count"
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {}

    def score(self, group: Group, weights: Weights, stats: Mapping[str, Tensor]) -> Tensor:
        """Influence of each unit in [0, 2], float32 [units], higher = keep; reads `cosine/<unit>`, no weights."""
        import torch

        return 1.0 - torch.stack([stats[f"cosine/{unit}"].float() for unit in group.units])
