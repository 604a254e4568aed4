"""EL2N: how far the predictions are from the label early in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class El2n:
    """Norm of the error ||softmax(f(x)) - onehot(y)||_2 early in training, mean over models.

    Probabilities 0.7 and 0.3 for an example of the second class: error (0.7, -0.7), score 0.9899. Of text without
    labels it is the mean over tokens of a causal language model's error, as the model is.

    Args:
        models: models that are averaged; the released scores have 1 and 20.
        epochs: passes over the data before the error is taken.
    """

    models: Annotated[int, Field(ge=1, strict=True)] = 10
    epochs: Annotated[int, Field(ge=1, strict=True)] = 3

    kinds: ClassVar[tuple[str, ...]] = ("examples",)
    needs: ClassVar[tuple[str, ...]] = ("labels and training, or a causal language model",)
    paper: ClassVar[str] = (
        "Deep Learning on a Data Diet: Finding Important Examples Early in Training, https://arxiv.org/abs/2107.07075"
    )
    evidence: ClassVar[str] = (
        "code: data_diet; model counts of the released scores of Beyond neural scaling laws; recalled: the mean over "
        "tokens for language models, When Less is More, https://arxiv.org/abs/2309.04564"
    )
    deviations: ClassVar[str] = (
        "by default a head on embeddings of a pretrained model is trained, not a network from scratch (--train "
        "model trains the whole small model), so `early` is a few epochs; a language model is asked as it is, not "
        "early in training"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"models": 1}

    def score(self, data: Examples) -> np.ndarray:
        """Mean error norm, float32 [n] in [0, sqrt(2)], higher = keep."""
        import numpy as np

        from prunekit.datasets.training import Run

        if not data.labelled and data.causal:
            return data.surprises()[:, 1]
        return np.mean([outcome.error for outcome in data.train(Run(epochs=self.epochs), self.models)], axis=0)
