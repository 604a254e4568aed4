"""Magnitude: how large the weights of a unit are, the oldest score there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.core.types import KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.scores._weights import Weights
    from prunekit.structure.parts import Group


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Magnitude:
    """Mean size of a unit's weights; small ones go first.

    The mean runs over all matrix weights of a unit, so that large and small units compare. A neuron owns a row of each
    matrix that leads to it and a column of the one that leads away; a KV group owns its rows of the query, key and
    value projections and its columns of the output projection; a hidden channel its row or column of every matrix
    that reads or writes the residual stream, embeddings included. Weights 3, -4, 0, 0 score 1.75 by l1 and 2.5 by l2.

    Args:
        norm: `l1` takes the mean of absolute values, `l2` the root of the mean of squares.
    """

    norm: Literal["l1", "l2"] = "l2"

    kinds: ClassVar[tuple[str, ...]] = KINDS
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = (
        "Learning both Weights and Connections for Efficient Neural Networks, https://arxiv.org/abs/1506.02626"
    )
    evidence: ClassVar[str] = "inferred: the usual structured form, a mean over the coupled rows and columns"
    deviations: ClassVar[str] = "whole units are scored, not single weights; biases and norms do not count"
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"norm": "l2"}

    def score(self, group: Group, weights: Weights, stats: Mapping[str, Tensor]) -> Tensor:
        """Mean size of each unit's weights, float32 [units], higher = keep; `stats` is not read."""
        import torch

        if group.axis:
            means = self._by_position(group, weights)
        else:
            means = torch.stack([self._mean(group, refs, weights) for refs in group.members])
        return (means.sqrt() if self.norm == "l2" else means).float()

    def _powers(self, tensor: Tensor) -> Tensor:
        return tensor.double().square() if self.norm == "l2" else tensor.double().abs()

    def _mean(self, group: Group, refs: Any, weights: Weights) -> Tensor:
        """Mean power over all matrices of a whole unit, read in pieces."""
        import torch

        from prunekit.scores._weights import matrices, pieces

        total, count = torch.zeros((), dtype=torch.float64), 0
        for ref in matrices(refs):
            for read in pieces(weights, ref):
                tensor = read()
                total += self._powers(tensor).sum()
                count += tensor.numel()
        return total / max(1, count)

    def _by_position(self, group: Group, weights: Weights) -> Tensor:
        """Mean power of each position of the group's axis, over all matrices that have it; an expert's are its own."""
        import torch

        from prunekit.scores._weights import by_axis, matrices

        total, count = torch.zeros(2, len(group.units), dtype=torch.float64)
        for ref in matrices(group.members[0]):
            if group.kind == "experts" and ref.expert is not None:
                tensor = weights(ref.name)
                total[ref.expert] += self._powers(tensor).sum()
                count[ref.expert] += tensor.numel()
                continue
            rows = by_axis(weights(ref.name), ref.layout, group.axis, group.sizes)
            total += self._powers(rows).sum(dim=1)
            count += rows.shape[1]
        return total / count.clamp(min=1)
