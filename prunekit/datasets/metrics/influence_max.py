"""Influence, largest: how much an example changes the one other example it matters most to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class InfluenceMax:
    """Largest |influence| of an example on another one over random subsets; influence as below.

    Influence on z is the chance to be right on z when the example was trained on, less the chance when it was not,
    over the models that did not train on z.

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
        "inferred: the released scores give the names; the formula is |Pr[h(z) right | x in S] - Pr[h(z) right | "
        "x not in S]| as in Feldman and Zhang"
    )
    deviations: ClassVar[str] = (
        "the test points are the data set's other examples in the models that did not train on them, not a test "
        "set; tens of models instead of thousands; by default a head on embeddings of a pretrained model is "
        "trained, not a network from scratch (--train model trains the whole small model)"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"models": 2, "epochs": 1}

    def score(self, data: Examples) -> np.ndarray:
        """Largest absolute influence, float32 [n], higher = keep."""
        from prunekit.datasets.metrics._subsets import influence, stacked
        from prunekit.datasets.training import Run

        outcomes = data.train(Run(epochs=self.epochs, subset=self.subset), self.models)
        return influence(*stacked(outcomes), "max")
