"""What models trained on random subsets say: memorization, influence, errors on what was held out.

k models, n examples; `members` [k, n] says who trained on what, `correct` [k, n] who was right on what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from prunekit.datasets.examples import Examples
    from prunekit.datasets.training import Outcome

# Examples whose influence on all others is held at once: 256 x 50,000 in float32 are 49 MiB.
_ROWS = 256


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class OverSubsets:
    """What the metrics of Feldman and Zhang share: many models, each trained on a random part of the examples.

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
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"models": 2, "epochs": 1}

    def trained(self, data: Examples) -> tuple[np.ndarray, np.ndarray]:
        """`members` and `correct` of all models, bool [k, n]."""
        from prunekit.datasets.training import Run

        return stacked(data.train(Run(epochs=self.epochs, subset=self.subset), self.models))


class Influence(OverSubsets):
    """What both sums of influence say of themselves."""

    evidence: ClassVar[str] = (
        "inferred: the released scores give the names; the formula is |Pr[h(z) right | x in S] - Pr[h(z) right | "
        "x not in S]| as in Feldman and Zhang"
    )
    deviations: ClassVar[str] = (
        "the test points are the data set's other examples in the models that did not train on them, not a test "
        "set; tens of models instead of thousands; by default a head on embeddings of a pretrained model is "
        "trained, not a network from scratch (--train model trains the whole small model)"
    )


def stacked(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """`members` and `correct` of all models, bool [k, n]."""
    return np.stack([o.members for o in outcomes]), np.stack([o.correct for o in outcomes])


def memorization(members: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Share right among models that trained on an example less the share among the others, float32 [n].

    0 where one of the two groups is empty.
    """
    inside, outside = members.sum(0), (~members).sum(0)
    right_in, right_out = (members & correct).sum(0), (~members & correct).sum(0)
    difference = right_in / np.maximum(inside, 1) - right_out / np.maximum(outside, 1)
    return np.where((inside > 0) & (outside > 0), difference, 0.0).astype(np.float32)


def influence(members: np.ndarray, correct: np.ndarray, over: Literal["max", "sum"]) -> np.ndarray:
    """Largest or summed |influence| of each example on the others, float32 [n].

    Influence of i on j is the share right on j among models that trained on i and not on j, less the share among those
    that trained on neither; 0 where one of the two groups is empty.
    """
    apart = (~members).astype(np.float32)
    right = apart * correct
    found = np.zeros(members.shape[1], np.float32)
    for first in range(0, len(found), _ROWS):
        own = members[:, first : first + _ROWS].astype(np.float32).T
        with_i, without_i = own @ apart, (1 - own) @ apart
        shares = own @ right / np.maximum(with_i, 1) - (1 - own) @ right / np.maximum(without_i, 1)
        shares = np.abs(np.where((with_i > 0) & (without_i > 0), shares, 0.0))
        found[first : first + _ROWS] = shares.max(1) if over == "max" else shares.sum(1)
    return found


def held_out_errors(members: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Share wrong among the models that did not train on an example, float32 [n]; 0 where all did."""
    outside = (~members).sum(0)
    return ((~members & ~correct).sum(0) / np.maximum(outside, 1)).astype(np.float32)
