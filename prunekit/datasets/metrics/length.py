"""Length of a text: what many a clever score turns out to measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import numpy as np

    from prunekit.datasets.examples import Examples


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Length:
    """Tokens of a text, or words where no model is given; nothing is cut."""

    kinds: ClassVar[tuple[str, ...]] = ("examples",)
    needs: ClassVar[tuple[str, ...]] = ("text",)
    paper: ClassVar[str] = ""
    evidence: ClassVar[str] = "inferred: a baseline, no paper"
    deviations: ClassVar[str] = ""
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {}

    def score(self, data: Examples) -> np.ndarray:
        """Length, float32 [n], higher = keep."""
        import numpy as np

        return data.lengths().astype(np.float32)
