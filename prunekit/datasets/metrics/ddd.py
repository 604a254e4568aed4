"""DDD: how many of a set of diverse models get an example wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Ddd:
    """Dichotomous data difficulty: share of diverse models that are wrong on an example they did not train on.

    0 is trivial, 1 impossible. The models differ in their subset and in the width of their head.

    Args:
        models: models, each on its own random subset.
        subset: share of the examples that each trains on.
        epochs: passes over the subset.
        widths: hidden units of the heads, by turns; 0 is linear.
    """

    models: Annotated[int, Field(ge=2, strict=True)] = 30
    subset: Annotated[float, Field(gt=0, lt=1)] = 0.7
    epochs: Annotated[int, Field(ge=1, strict=True)] = 10
    widths: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = (0, 32, 256)

    kinds: ClassVar[tuple[str, ...]] = ("examples",)
    needs: ClassVar[tuple[str, ...]] = ("labels", "training")
    paper: ClassVar[str] = (
        "Trivial or impossible: dichotomous data difficulty masks model differences, https://arxiv.org/abs/2110.05922"
    )
    evidence: ClassVar[str] = (
        "inferred: the cited idea (agreement of an ensemble of diverse models); the exact number of the released "
        "scores is not known"
    )
    deviations: ClassVar[str] = (
        "models differ in head width and subset, not in architecture; only models that did not train on an "
        "example are asked; one that all trained on scores 0"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"models": 2, "epochs": 1}

    def score(self, data: Examples) -> np.ndarray:
        """Share of wrong models, float32 [n] in [0, 1], higher = keep."""
        from prunekit.datasets.metrics._subsets import held_out_errors, stacked
        from prunekit.datasets.training import Run

        run = Run(epochs=self.epochs, subset=self.subset, widths=self.widths)
        return held_out_errors(*stacked(data.train(run, self.models)))
