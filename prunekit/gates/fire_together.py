"""Fire Together Wire Together: for each input, compute the units that are expected to answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import UsageError

if TYPE_CHECKING:
    from prunekit.gates._fire import Firing
    from prunekit.gates._learn import Task
    from prunekit.heal._loop import Course


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FireTogether:
    """Learns to foretell which units of a sub-layer answer to an input, and computes those alone. No parameter goes.

    A predictor for each sub-layer reads the mean over tokens of what the sub-layer reads and gives every unit a logit;
    above 0 the unit is computed. It is trained on what the dense model does, without labels: the target of a sequence
    are the units with the greatest responses over its tokens that together have a fraction of the sum of all; the
    fraction is the one at which targets leave out what the budget asks for. Weights stay.

    A model that writes text reads the first `tokens` tokens of a sequence with all neurons; they decide for the rest
    of it, prompt and continuation, so that nothing is foretold from what comes later. A text encoder decides from the
    whole text, for neurons and heads. `prunekit.modeling.dynamic` runs such a folder; loaded without it, it is the
    dense model. One sequence at a time saves the work of the units left out; of several each has its own, and all are
    computed.

    Args:
        targets: `mass` keeps units up to a fraction of the responses, so that sub-layers and inputs differ in how many;
            `uniform` the same share everywhere.
        response: of a unit over the tokens: root of its mean square, or its greatest norm (`max`, as in the paper).
        rank: of each predictor's matrix.
        tokens: that a model which writes text reads first.
        predictor_lr: peak learning rate.
    """

    targets: Literal["mass", "uniform"] = "mass"
    response: Literal["rms", "max"] = "rms"
    rank: int = Field(default=32, ge=1)
    tokens: int = Field(default=32, ge=1)
    predictor_lr: float = Field(default=3e-3, gt=0)

    dynamic: ClassVar[bool] = True
    trains_weights: ClassVar[bool] = False
    share: ClassVar[float] = 1.0
    kinds: ClassVar[tuple[str, ...]] = ("neurons", "kv_groups", "query_heads")
    needs: ClassVar[tuple[str, ...]] = ("text",)
    paper: ClassVar[str] = (
        "Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction, "
        "https://arxiv.org/abs/2110.08232"
    )
    evidence: ClassVar[str] = (
        "code: predictor, targets by mass, binary cross entropy, decoupled training, for convolutions; carried over to "
        "neurons and heads: inferred"
    )
    deviations: ClassVar[str] = (
        "neurons and heads for filters, tokens for places of an image; responses are root mean squares by default: "
        "with the true targets of 2 x 128 tokens and 27 % of the neurons of SmolLM2-135M left out perplexity went from "
        "19.8 to 24.4, by the greatest norm to 28.5; predictors of low rank behind a layer norm (the paper: softmax "
        "and a full matrix) begin with how often each unit fired in the first batch; the fraction follows the budget; "
        "weights are not trained with the masks; in models that write text the first tokens decide"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"targets": "mass"}

    def check(self, decoder: bool) -> None:
        """Nothing that depends on what the model reads alone."""

    def gates(self, task: Task) -> Firing:
        """Predictors for all places of a task.

        Raises:
            UsageError: if sequences are too short, or a sub-layer would have two predictors.
        """
        from prunekit.gates._fire import Firing, places_once

        decoder = task.view.arch.decoder
        if decoder and task.asked.length_tokens <= self.tokens:
            raise UsageError(
                f"sequences of {task.asked.length_tokens} tokens leave none after the first {self.tokens}",
                hint="raise `learn.length_tokens`, or lower `learn.tokens`",
            )
        if not places_once(task.places):
            raise UsageError("`learn.remove` names heads twice", hint="keep `kv_groups` or `query_heads`")
        return Firing(self, task, decoder)

    def course(self, gates: Firing, task: Task, weights: list[Any]) -> tuple[Course, None]:
        """Optimizer groups; the gates are the whole loss themselves."""
        from prunekit.heal._loop import Course

        groups = [{"params": list(gates.predictors.parameters()), "lr": self.predictor_lr, "weight_decay": 0.0}]
        return Course("learning predictors", groups, lower="`learn.predictor_lr`, "), None
