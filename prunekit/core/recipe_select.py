"""The part of a recipe that chooses among its data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictFloat, StrictStr

from prunekit.core.recipe_base import Part


class Select(Part):
    """Which sequences of the data stay, scored by the model before any cut; more are read than stay."""

    metric: StrictStr = Field(
        description="Metric of data pruning that needs no labels: loss, perplexity, el2n, ssl_prototypes, length or "
        "random."
    )
    keep: StrictFloat = Field(gt=0, le=1, description="Fraction kept of the sequences that are read.")
    rule: Literal["hard", "easy", "auto"] = Field(
        default="auto", description="Keep the highest scores, the lowest, or decide by how much text there is."
    )
