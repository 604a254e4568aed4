"""Fine-tuning: the cut model learns from text alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.core.errors import UsageError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from prunekit.heal.scene import Objective, Scene


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Finetune:
    """Trains the cut model on the cross entropy of the next token; no dense model is needed.

    The model moves towards the text it sees. A narrow text costs it what the text does not ask for: mix several, or use
    `distill`.
    """

    needs: ClassVar[tuple[str, ...]] = ("text",)
    paper: ClassVar[str] = "The Unreasonable Ineffectiveness of the Deeper Layers, https://arxiv.org/abs/2403.17887"
    evidence: ClassVar[str] = "text: healing by next-token training after layers were removed"
    deviations: ClassVar[str] = (
        "full precision instead of quantised weights; all weights by default, adapters by option"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {}

    def check(self, decoder: bool) -> None:
        """Fails for an encoder.

        Args:
            decoder: whether the model writes text.
        Raises:
            UsageError: if it does not.
        """
        if not decoder:
            raise UsageError(
                "`finetune` needs a model that writes text",
                why="an encoder has no next token to learn",
                hint="use `method: distill`, which learns the dense model's hidden states",
            )

    def objective(self, scene: Scene, data: Mapping[str, Tensor]) -> Objective:
        """The loss.

        Args:
            scene: the student.
            data: all rows of the training data by input name.
        """
        return _Objective()


class _Objective:
    hidden_states = False
    teacher = None
    of_tokens = True

    def listening(self, model: Any) -> AbstractContextManager[None]:
        """Nothing is seen but outputs."""
        return nullcontext()

    def __call__(self, outputs: Any, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        from prunekit.heal._losses import next_token

        return next_token(outputs.logits, inputs["input_ids"])
