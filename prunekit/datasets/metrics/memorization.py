"""Memorization: whether an example is only right when it was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Memorization:
    """Chance to be right on an example when it was trained on, less the chance when it was not, over random subsets.

    Right in 3 of 4 models that saw it and in 1 of 4 that did not: 0.75 - 0.25 = 0.5.

    Args:
        models: models, each on its own random subset; the estimate's error falls with the square root of it.
        subset: share of the examples that each trains on.
        epochs: passes over the subset.
    """

    models: Annotated[int, Field(ge=2, strict=True)] = 40
    subset: Annotated[float, Field(gt=0, lt=1)] = 0.7
    epochs: Annotated[int, Field(ge=1, strict=True)] = 10

    kinds: ClassVar[tuple[str, ...]] = ("examples",)
    needs: ClassVar[tuple[str, ...]] = ("labels", "training")
    paper: ClassVar[str] = (
        "What Neural Networks Memorize and Why: Discovering the Long Tail via Influence Estimation, "
        "https://arxiv.org/abs/2008.03703"
    )
    evidence: ClassVar[str] = (
        "text: Pr[h(x) = y | x in S] - Pr[h(x) = y | x not in S]; the released scores hold a file of it"
    )
    deviations: ClassVar[str] = (
        "tens of models instead of thousands, so small differences are noise; an example that was in every "
        "subset, or in none, scores 0; by default a head on embeddings of a pretrained model is trained, not a "
        "network from scratch (--train model trains the whole small model)"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"models": 2, "epochs": 1}

    def score(self, data: Examples) -> np.ndarray:
        """Estimated difference, float32 [n] in [-1, 1], higher = keep."""
        from prunekit.datasets.metrics._subsets import memorization, stacked
        from prunekit.datasets.training import Run

        outcomes = data.train(Run(epochs=self.epochs, subset=self.subset), self.models)
        return memorization(*stacked(outcomes))
