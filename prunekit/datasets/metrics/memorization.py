"""Memorization: whether an example is only right when it was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.datasets.metrics._subsets import OverSubsets, memorization

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Memorization(OverSubsets):
    """Chance to be right on an example when it was trained on, less the chance when it was not, over random subsets.

    Right in 3 of 4 models that saw it and in 1 of 4 that did not: 0.75 - 0.25 = 0.5.

    Args:
        models: models, each on its own random subset; the estimate's error falls with the square root of it.
        subset: share of the examples that each trains on.
        epochs: passes over the subset.
    """

    evidence: ClassVar[str] = (
        "text: Pr[h(x) = y | x in S] - Pr[h(x) = y | x not in S]; the released scores hold a file of it"
    )
    deviations: ClassVar[str] = (
        "tens of models instead of thousands, so small differences are noise; an example that was in every "
        "subset, or in none, scores 0; by default a head on embeddings of a pretrained model is trained, not a "
        "network from scratch (--train model trains the whole small model)"
    )

    def score(self, data: Examples) -> np.ndarray:
        """Estimated difference, float32 [n] in [-1, 1], higher = keep."""
        return memorization(*self.trained(data))
