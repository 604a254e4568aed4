"""GraNd: how hard an example pulls at the weights early in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GradNorm:
    """Norm of an example's own gradient ||d CE(x, y) / d weights||_2 at or near the start, mean over models.

    Args:
        models: initialisations that are averaged.
        epochs: passes over the data before the gradient is taken; 0 takes it at the start.
    """

    models: Annotated[int, Field(ge=1, strict=True)] = 10
    epochs: Annotated[int, Field(ge=0, strict=True)] = 1

    kinds: ClassVar[tuple[str, ...]] = ("examples",)
    needs: ClassVar[tuple[str, ...]] = ("labels", "training")
    paper: ClassVar[str] = (
        "Deep Learning on a Data Diet: Finding Important Examples Early in Training, https://arxiv.org/abs/2107.07075"
    )
    evidence: ClassVar[str] = "code: data_diet (it is not among the released scores of Beyond neural scaling laws)"
    deviations: ClassVar[str] = (
        "by default a head on embeddings of a pretrained model is trained, not a network from scratch (--train "
        "model trains the whole small model), so `early` is a few epochs; over all trained weights"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"models": 1}

    def score(self, data: Examples) -> np.ndarray:
        """Mean gradient norm, float32 [n], higher = keep."""
        import numpy as np

        from prunekit.datasets.training import Run

        run = Run(epochs=self.epochs, records=("gradients",))
        return np.mean([outcome.gradient for outcome in data.train(run, self.models)], axis=0)
