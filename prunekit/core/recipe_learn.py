"""The part of a recipe that learns by training which units go."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, StrictFloat, StrictInt, StrictStr

from prunekit.core.recipe_base import Part
from prunekit.core.recipe_heal import Training

Gated = Literal["hidden", "query_heads", "kv_groups", "neurons", "sublayers", "attention", "ffn"]


class LearnBudget(Part):
    """How much goes in all, over every kind of unit that is learned."""

    remove: StrictFloat = Field(gt=0, lt=1, description="Fraction removed at least, short of half a per cent of it.")
    of: Literal["params", "flops"] = Field(
        default="params", description="What the fraction is of. Embeddings and the head do not count."
    )
    within: Literal["group", "model"] = Field(
        default="model", description="`group`: widths stay alike in all blocks, by the mean of what was learned."
    )
    multiple_of: StrictInt = Field(
        default=1, ge=1, description="Neurons and hidden channels that stay are multiples of this."
    )
    min_keep: StrictInt = Field(default=1, ge=1, description="Units that stay in each narrowed group at least.")
    protect: tuple[StrictStr, ...] = Field(
        default=(), description="Addresses that stay, with * and ? allowed, such as `blocks.0.*`."
    )


class Learn(Training):
    """Masks learned by training, by registry name, with the method's knobs beside the name.

    It comes after the steps and sees what they leave; what it keeps is cut in the same plan.
    """

    section: ClassVar[str] = "learn"

    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="constant", description="How the learning rate falls after the warm-up."
    )
    remove: tuple[Gated, ...] = Field(min_length=1, description="Kinds of units that can go.")
    budget: LearnBudget = Field(description="How much goes, of what, and what stays.")
