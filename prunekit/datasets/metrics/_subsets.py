"""What models trained on random subsets say: memorization, influence, errors on what was held out.

k models, n examples; `members` [k, n] says who trained on what, `correct` [k, n] who was right on what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from prunekit.datasets.training import Outcome

# Examples whose influence on all others is held at once: 256 x 50,000 in float32 are 49 MiB.
_ROWS = 256


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
