"""Influence, largest: how much an example changes the one other example it matters most to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.datasets.metrics._subsets import Influence, influence

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class InfluenceMax(Influence):
    """Largest |influence| of an example on another one over random subsets; influence as below.

    Influence on z is the chance to be right on z when the example was trained on, less the chance when it was not,
    over the models that did not train on z.

    Args:
        models: models, each on its own random subset; the estimate's error falls with the square root of it.
        subset: share of the examples that each trains on.
        epochs: passes over the subset.
    """

    def score(self, data: Examples) -> np.ndarray:
        """Largest absolute influence, float32 [n], higher = keep."""
        return influence(*self.trained(data), "max")
