"""Perplexity: how surprising a text is to a causal language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Perplexity:
    """exp of the mean loss a token under a causal language model; texts are cut at `--max-tokens`."""

    kinds: ClassVar[tuple[str, ...]] = ("examples",)
    needs: ClassVar[tuple[str, ...]] = ("causal language model",)
    paper: ClassVar[str] = ""
    evidence: ClassVar[str] = "inferred: a baseline, no paper"
    deviations: ClassVar[str] = ""
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {}

    def score(self, data: Examples) -> np.ndarray:
        """Perplexity, float32 [n], higher = keep; the first token is not scored."""
        import numpy as np

        return np.exp(data.surprises()[:, 0].clip(max=80.0))
