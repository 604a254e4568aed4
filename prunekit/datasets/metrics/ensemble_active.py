"""Ensemble active learning: where the models of an ensemble disagree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


# Examples of which all models' predictions are held at once.
_ROWS = 4096


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class EnsembleActive:
    """Mutual information between label and model, in nats: entropy of the mean prediction less the mean entropy.

    Two models sure of two different classes: ln 2 - 0 = 0.6931. Two models that both say 50:50: 0.

    Args:
        models: models of the ensemble.
        subset: share of the examples that each trains on.
        epochs: passes over the subset.
    """

    models: Annotated[int, Field(ge=2, strict=True)] = 10
    subset: Annotated[float, Field(gt=0, lt=1)] = 0.5
    epochs: Annotated[int, Field(ge=1, strict=True)] = 10

    kinds: ClassVar[tuple[str, ...]] = ("examples",)
    needs: ClassVar[tuple[str, ...]] = ("labels", "training")
    paper: ClassVar[str] = "Training Data Subset Search with Ensemble Active Learning, https://arxiv.org/abs/1905.12737"
    evidence: ClassVar[str] = (
        "text: mutual information is one of the paper's acquisition functions; the released score is binary "
        "(inside an 80 % subset or not)"
    )
    deviations: ClassVar[str] = (
        "a graded score instead of a binary one; one round; an ensemble of heads on random halves instead of "
        "checkpoints of training runs"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"models": 2, "epochs": 1}

    def score(self, data: Examples) -> np.ndarray:
        """Mutual information, float32 [n] in [0, ln models], higher = keep."""
        import numpy as np

        from prunekit.datasets.training import Run

        run = Run(epochs=self.epochs, subset=self.subset, records=("probabilities",))
        files = [outcome.probabilities for outcome in data.train(run, self.models) if outcome.probabilities]
        held = [np.load(file, mmap_mode="r") for file in files]
        found = np.empty(data.n, np.float32)
        for first in range(0, data.n, _ROWS):
            part = np.stack([array[first : first + _ROWS] for array in held]).astype(np.float64)
            found[first : first + _ROWS] = _entropy(part.mean(0)) - _entropy(part).mean(0)
        return found


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    import numpy as np

    found: np.ndarray = -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(-1)
    return found
