"""Self-supervised prototypes: how far an example is from its cluster's centre."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


# Of the published ports of this metric.
_WITHOUT_LABELS = 30


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SslPrototypes:
    """One minus the cosine between an example's embedding and the nearest centroid of k-means; needs no labels.

    Args:
        clusters: k; 0 takes the number of classes, or 30 without labels, and at most a tenth of the examples. The
            paper finds that an order of magnitude either way matters little.
        iterations: of k-means.
        normalize: bring embeddings to length 1 first, so that clusters and score measure the same thing.
        engine: `auto` takes faiss where it is installed. The two begin differently and give different clusters.
    """

    clusters: Annotated[int, Field(ge=0, strict=True)] = 0
    iterations: Annotated[int, Field(ge=1, strict=True)] = 25
    normalize: bool = True
    engine: Literal["auto", "faiss", "scikit-learn"] = "auto"

    kinds: ClassVar[tuple[str, ...]] = ("examples",)
    needs: ClassVar[tuple[str, ...]] = ("embeddings",)
    paper: ClassVar[str] = (
        "Beyond neural scaling laws: beating power law scaling via data pruning, https://arxiv.org/abs/2206.14486"
    )
    evidence: ClassVar[str] = (
        "code: README of the released scores (self-supervised embeddings, k-means, cosine to the assigned "
        "centroid); defaults are ours"
    )
    deviations: ClassVar[str] = (
        "embeddings are those of the model that is given, not SwAV; normalised before k-means; beyond the memory "
        "bound a sample (faiss) or minibatches (scikit-learn) fit the centroids"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"clusters": 2}

    def score(self, data: Examples) -> np.ndarray:
        """Distance, float32 [n] in [0, 2], higher = keep."""
        import numpy as np

        from prunekit.datasets.clusters import fit, nearest, require_points
        from prunekit.datasets.metrics._cosine import cosine_distance, unit_length

        def blocks() -> Iterator[tuple[int, np.ndarray]]:
            for first, block in data.embedding_blocks():
                yield first, unit_length(block) if self.normalize else block

        k = self.clusters or max(1, min(data.n_classes or _WITHOUT_LABELS, data.n // 10))
        # Here already, before anything is embedded.
        require_points(data.n, k)
        seed, memory = data.settings.seed, data.settings.memory_mib
        made = fit(blocks, data.n, data.width, k, seed, self.iterations, self.engine, memory)
        found = np.empty(data.n, np.float32)
        for first, block in blocks():
            found[first : first + len(block)] = cosine_distance(block, made.centroids[nearest(block, made.centroids)])
        return found
