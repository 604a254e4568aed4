"""Random scores: the floor that a metric must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Random:
    """Uniform numbers drawn from the seed and an example's position."""

    kinds: ClassVar[tuple[str, ...]] = ("examples",)
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    evidence: ClassVar[str] = "inferred: a baseline, no paper"
    deviations: ClassVar[str] = ""
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {}

    def score(self, data: Examples) -> np.ndarray:
        """Numbers in [0, 1), float32 [n]."""
        import numpy as np

        return np.random.default_rng(data.settings.seed).random(data.n, dtype=np.float32)
