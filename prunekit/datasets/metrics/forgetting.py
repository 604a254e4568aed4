"""Forgetting events: how often an example is unlearnt during training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Forgetting:
    """Times that an example, when its turn comes in training, is wrong after it was right the time before.

    Right, wrong, right, wrong: 2. An example that is never right scores `epochs`, more than any that is sometimes.

    Args:
        models: models whose counts are averaged.
        epochs: passes over the data.
    """

    models: Annotated[int, Field(ge=1, strict=True)] = 3
    epochs: Annotated[int, Field(ge=2, strict=True)] = 20

    kinds: ClassVar[tuple[str, ...]] = ("examples",)
    needs: ClassVar[tuple[str, ...]] = ("labels", "training")
    paper: ClassVar[str] = (
        "An Empirical Study of Example Forgetting during Deep Neural Network Learning, https://arxiv.org/abs/1812.05159"
    )
    evidence: ClassVar[str] = (
        "code: data_diet (correct to incorrect flips, counted as the example is trained on; never-correct scores +inf)"
    )
    deviations: ClassVar[str] = (
        "never-correct scores `epochs` instead of infinity; the mean over models; by default a head on embeddings "
        "of a pretrained model is trained, not a network from scratch (--train model trains the whole small "
        "model)"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"models": 1, "epochs": 4}

    def score(self, data: Examples) -> np.ndarray:
        """Mean count, float32 [n] in [0, epochs], higher = keep."""
        import numpy as np

        from prunekit.datasets.training import Run

        outcomes = data.train(Run(epochs=self.epochs), self.models)
        counts = [np.where(outcome.learned, outcome.forgotten, self.epochs) for outcome in outcomes]
        return np.stack(counts).mean(axis=0, dtype=np.float32)
