"""What every training of a recipe has, and the training of what a cut left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_serializer, model_validator

from prunekit.core.recipe_base import Part, gathered, named_text
from prunekit.core.recipe_select import Select


class HealText(Part):
    """One of the texts that healing mixes; a bare text names the data."""

    data: StrictStr = Field(
        min_length=1, description="As for `calibrate.data`; `teacher` is text that the dense model writes."
    )
    weight: StrictFloat = Field(default=1.0, gt=0, description="Share of the sequences, beside the others' weights.")
    prompts: StrictStr | None = Field(
        default=None,
        min_length=1,
        description="With `teacher`: text that its sequences begin with; null begins with the BOS token.",
    )
    prompt_tokens: StrictInt = Field(default=16, ge=1, description="With `prompts`: tokens that are given.")
    _short = model_validator(mode="before")(named_text)


class Training(Part):
    """How a model is trained, by registry name, with the method's knobs beside the name."""

    section: ClassVar[str] = ""

    method: StrictStr = Field(description="What is trained for.")
    data: tuple[HealText, ...] = Field(
        default=(HealText(data="wikitext2"),),
        min_length=1,
        description="A text as for `calibrate.data`, `teacher` for text that the dense model writes, or a list.",
    )
    sequences: StrictInt | None = Field(
        default=None, ge=2, description="Sequences in all; null takes what the texts hold, at most one pass over them."
    )
    length_tokens: StrictInt = Field(default=256, ge=2, description="Tokens in each sequence.")
    select: Select | None = Field(
        default=None,
        description="Choose the sequences of each text that is read by a metric; null takes them as they are drawn.",
    )
    held_out: StrictFloat = Field(
        default=0.05, ge=0, lt=1, description="Fraction of the sequences that is watched, not trained on."
    )
    steps: StrictInt = Field(default=200, ge=1, description="Optimizer steps at most; the schedule spans them.")
    minutes: StrictFloat | None = Field(
        default=None, gt=0, description="Training stops after so long, whatever is left of the steps."
    )
    batch: StrictInt = Field(default=8, ge=1, description="Sequences in a step, over all devices.")
    accumulate: StrictInt = Field(default=1, ge=1, description="Passes that a step's sequences are split into.")
    lr: StrictFloat = Field(default=1e-4, gt=0, description="Peak of the learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate falls after the warm-up."
    )
    warm_up: StrictFloat = Field(default=0.05, ge=0, lt=1, description="Fraction of the steps it rises in.")
    weight_decay: StrictFloat = Field(default=0.0, ge=0, description="Of AdamW.")
    max_grad_norm: StrictFloat = Field(default=1.0, gt=0, description="Longer gradients are shortened to this.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Type to compute in; weights and optimizer are float32 either way."
    )
    check_every: StrictInt = Field(
        default=50, ge=1, description="Steps between checkpoints; each measures the loss on the held-out part."
    )
    patience: StrictInt | None = Field(
        default=None, ge=1, description="Checks without a better held-out loss after which training stops."
    )
    seed: StrictInt = Field(default=0, ge=0, description="Of the order of data, of adapters and of sampled text.")
    knobs: dict[str, Any] = Field(default_factory=dict, description="Knobs of the method.")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        found = gathered(data, set(cls.model_fields) - {"knobs"})
        if isinstance(found, Mapping) and isinstance(found.get("data"), str | Mapping):
            found = {**found, "data": [found["data"]]}
        return found

    @model_serializer
    def _flatten(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in type(self).model_fields if name not in ("data", "knobs")}
        texts = [text.model_dump(exclude_none=True) for text in self.data]
        known = {key: value for key, value in plain.items() if key != "method" and value is not None}
        return {"method": self.method, **self.knobs, "data": texts, **known}


class HealAttention(Part):
    """Attention in training, by registry name, with the method's knobs beside the name; a bare text is the name."""

    method: StrictStr = Field(description="Which attention.")
    knobs: dict[str, Any] = Field(default_factory=dict, description="Knobs of the method.")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        return gathered({"method": data} if isinstance(data, str) else data, ("method",))

    @model_serializer
    def _flatten(self) -> dict[str, Any]:
        return {"method": self.method, **self.knobs}


class Heal(Training):
    """Training after the cut, by registry name, with the method's knobs beside the name."""

    section: ClassVar[str] = "heal"

    train: Literal["all", "lora"] = Field(
        default="all", description="All weights, or adapters of low rank that are merged into them at the end."
    )
    lora_rank: StrictInt = Field(default=16, ge=1, description="Rank of the adapters.")
    lora_alpha: StrictFloat = Field(default=32.0, gt=0, description="The adapters' scale is this over their rank.")
    attention: HealAttention | None = Field(
        default=None,
        description="Attention that is trained with in the place of the model's own, which comes back afterwards: "
        "shifted_sparse or subsampled; null trains with its own.",
    )
    compile: StrictBool = Field(
        default=False,
        description="Run the blocks of both models and the divergence compiled; for GPUs; needs a C compiler.",
    )
