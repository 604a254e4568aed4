"""Wanda: weights times the size of what enters them, summed over whole units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.core.errors import StructureError

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.scores._weights import Weights
    from prunekit.structure.parts import Group


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Wanda:
    """Mean of |weight| times root mean square input over the weights by which a unit leads to the residual stream.

    A neuron has one column of the FFN's output projection, a query head or a KV group the columns of its heads. The
    column 3, -4 whose input is 2 in the root mean square scores 7.
    """

    kinds: ClassVar[tuple[str, ...]] = ("query_heads", "kv_groups", "neurons")
    needs: ClassVar[tuple[str, ...]] = ("projection",)
    paper: ClassVar[str] = (
        "A Simple and Effective Pruning Approach for Large Language Models, https://arxiv.org/abs/2306.11695"
    )
    evidence: ClassVar[str] = "text: equation 1, |W| times the norm of the input channel"
    deviations: ClassVar[str] = (
        "whole units are scored by the mean over their weights in the output projection, as Wanda-sp in FLAP "
        "(https://arxiv.org/abs/2312.11983) does; the norm is divided by the number of tokens"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {}

    def score(self, group: Group, weights: Weights, stats: Mapping[str, Tensor]) -> Tensor:
        """Score of each unit, float32 [units], higher = keep; reads `projection/square/<sub-layer>`."""
        from prunekit.scores._weights import by_axis

        ref = group.output
        if ref is None:
            why = "every expert has its own"
            raise StructureError(f"`{group.address}` has no single output projection", why=why, hint="use `magnitude`")
        sizes = stats[f"projection/square/{group.address.rpartition('.')[0]}"].double().sqrt()
        matrix = weights(ref.name).double().abs()
        scaled = matrix * (sizes if ref.layout[0] == ("hidden",) else sizes[:, None])
        return by_axis(scaled, ref.layout, group.axis, group.sizes).mean(dim=1).float()
