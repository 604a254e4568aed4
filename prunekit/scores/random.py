"""Random scores: the floor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.types import KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.scores._weights import Weights
    from prunekit.structure.parts import Group


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Random:
    """Numbers drawn from a seed and the group's address: the same on every machine.

    Args:
        seed: draws the numbers.
    """

    seed: Annotated[int, Field(ge=0, strict=True)] = 0

    kinds: ClassVar[tuple[str, ...]] = KINDS
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    evidence: ClassVar[str] = "inferred: a baseline, no paper"
    deviations: ClassVar[str] = ""
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"seed": 1}

    def score(self, group: Group, weights: Weights, stats: Mapping[str, Tensor]) -> Tensor:
        """Uniform numbers in [0, 1), float32 [units], higher = keep; reads neither weights nor statistics."""
        import hashlib

        import torch

        digest = hashlib.sha256(f"{self.seed}/{group.kind}/{group.address}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(len(group.units), generator=generator, dtype=torch.float32)
