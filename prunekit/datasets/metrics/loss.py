"""Loss: how badly a trained model does on an example."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Loss:
    """Cross-entropy in nats: of a trained classifier where there are labels, of a causal model, a token, elsewhere.

    Args:
        models: classifiers that are averaged; a language model is asked as it is.
        epochs: passes over the data by the classifiers.
    """

    models: Annotated[int, Field(ge=1, strict=True)] = 1
    epochs: Annotated[int, Field(ge=1, strict=True)] = 10

    kinds: ClassVar[tuple[str, ...]] = ("examples",)
    needs: ClassVar[tuple[str, ...]] = ("labels and training, or a causal language model",)
    paper: ClassVar[str] = ""
    evidence: ClassVar[str] = "inferred: a baseline, no paper"
    deviations: ClassVar[str] = ""
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"models": 1, "epochs": 1}

    def score(self, data: Examples) -> np.ndarray:
        """Mean loss, float32 [n], higher = keep."""
        import numpy as np

        from prunekit.datasets.training import Run

        if not data.labelled:
            return data.surprises()[:, 0]
        return np.mean([outcome.loss for outcome in data.train(Run(epochs=self.epochs), self.models)], axis=0)
