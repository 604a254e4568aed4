"""Supervised prototypes: how unlike its class an example is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SupervisedPrototypes:
    """One minus the cosine between an example's embedding and the mean embedding of its class."""

    kinds: ClassVar[tuple[str, ...]] = ("examples",)
    needs: ClassVar[tuple[str, ...]] = ("labels", "embeddings")
    paper: ClassVar[str] = (
        "Beyond neural scaling laws: beating power law scaling via data pruning, https://arxiv.org/abs/2206.14486"
    )
    evidence: ClassVar[str] = "code: README of the released scores (cosine, orientation); inferred: the class mean"
    deviations: ClassVar[str] = "embeddings are those of the model that is given"
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {}

    def score(self, data: Examples) -> np.ndarray:
        """Distance, float32 [n] in [0, 2], higher = keep; two passes over the embeddings."""
        import numpy as np

        from prunekit.datasets.metrics._cosine import cosine_distance

        labels, sums = data.labels, np.zeros((data.n_classes, data.width))
        for first, block in data.embedding_blocks():
            np.add.at(sums, labels[first : first + len(block)], block)
        found = np.empty(data.n, np.float32)
        for first, block in data.embedding_blocks():
            own = labels[first : first + len(block)]
            found[first : first + len(block)] = cosine_distance(block, sums[own])
        return found
