"""The recipe as frozen models: what may be written, of which type, in which range.

What one field cannot know (two keys that exclude each other, a method and its knobs) is checked in `recipe_check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    model_serializer,
    model_validator,
)

from prunekit.core.recipe_base import Part, gathered
from prunekit.core.recipe_evaluate import Evaluate, Expect
from prunekit.core.recipe_heal import Heal
from prunekit.core.recipe_learn import Learn
from prunekit.core.recipe_runtime import Runtime
from prunekit.core.recipe_select import Select
from prunekit.core.registry import ATTENTIONS, GATES, HEALS, PATTERNS, REPAIRS, SCORES, SEARCHES, TASKS, Registry
from prunekit.core.types import WIDTH_KINDS, Kind

DEVICES = r"^(auto|cpu|mps|cuda(:\d+)?)$"
# Where a result can be asked to load; `plan/loads.py` says what each takes.
Target = Literal[
    "transformers",
    "prunekit",
    "remote_code",
    "vllm",
    "tensorrt_llm",
    "llama_cpp",
    "onnxruntime",
    "onnxruntime_genai",
]
# Values of a search's `candidates` that leave attention and FFN taking turns.
ALTERNATING = ("pairs", "blocks")
REGISTRIES: dict[str, Registry] = {"score": SCORES, "search": SEARCHES}


class Model(Part):
    """The model that is pruned."""

    source: StrictStr = Field(
        min_length=1,
        description="Folder, hub id, GGUF file, or a packaged model's name such as `smollm2-135m-instruct`.",
    )
    revision: StrictStr | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="Type to compute in; null chooses by device. Weights keep the type they have on disk."
    )
    device: StrictStr = Field(default="auto", pattern=DEVICES, description="`auto`, `cpu`, `mps`, `cuda` or `cuda:1`.")
    offload: Literal["auto", "always", "never"] = Field(
        default="auto",
        description=(
            "On a CPU, leave weights in their files while methods calibrate, and read each block when it is its turn: "
            "`auto` does where the model does not fit into free memory."
        ),
    )
    trust_remote_code: StrictBool = Field(
        default=False, description="Run the code that the model's folder brings along."
    )


class Calibrate(Part):
    """Text that methods run the model on before the cut."""

    data: StrictStr = Field(
        default="wikitext2", min_length=1, description="`wikitext2`, a .txt or .jsonl file, or a data set's folder."
    )
    sequences: StrictInt = Field(default=10, ge=1, description="How many sequences.")
    length_tokens: StrictInt = Field(default=256, ge=2, description="Tokens in each sequence.")
    seed: StrictInt = Field(
        default=0, ge=0, description="0 takes windows from the start; above 0 draws where they begin."
    )
    select: Select | None = Field(
        default=None, description="Choose the sequences by a metric; null takes them as they come."
    )


class Method(Part):
    """The method that chooses, by registry name, with its knobs beside the name."""

    score: StrictStr | None = Field(default=None, description="Method that scores units; the lowest go.")
    search: StrictStr | None = Field(
        default=None, description="Method that runs the cut model to decide what goes next."
    )
    knobs: dict[str, Any] = Field(default_factory=dict, description="Knobs of the method.")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        return gathered(data, ("score", "search"))

    @model_serializer
    def _flatten(self) -> dict[str, Any]:
        return {self.role: self.name, **self.knobs}

    @property
    def role(self) -> str:
        """`score` or `search`."""
        return "search" if self.search is not None else "score"

    @property
    def name(self) -> str:
        """Registry name of the method."""
        return self.search or self.score or ""


class Repair(Part):
    """What makes up for the cut in closed form, by registry name, with its knobs beside the name."""

    method: StrictStr = Field(description="Method that fits new weights once all steps are planned.")
    calibrate: Calibrate = Field(
        default=Calibrate(sequences=64), description="What it is fitted on; 64 sequences where not said."
    )
    knobs: dict[str, Any] = Field(default_factory=dict, description="Knobs of the method.")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        return gathered(data, ("method", "calibrate"))

    @model_serializer
    def _flatten(self) -> dict[str, Any]:
        return {"method": self.method, **self.knobs, "calibrate": self.calibrate.model_dump()}


class Vocab(Part):
    """Which tokens stay: the most frequent of a text, with what they are built from, special ones and characters."""

    data: StrictStr = Field(
        default="wikitext2", min_length=1, description="As for `calibrate.data`; all of it is read."
    )
    keep: StrictInt | None = Field(default=None, ge=1, description="Tokens that stay; give this or `coverage`.")
    coverage: StrictFloat | None = Field(
        default=None, gt=0, le=1, description="Share of the text's tokens that stay; 1.0 keeps all that come up in it."
    )
    multiple_of: StrictInt = Field(default=1, ge=1, description="Rows that stay are a multiple of this, rounded up.")

    @model_validator(mode="after")
    def _one(self) -> Vocab:
        if (self.keep is None) == (self.coverage is None):
            raise ValueError("give `keep`, a count, or `coverage`, a share such as 1.0")
        return self


class Budget(Part):
    """How much goes."""

    remove: StrictFloat | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Fraction removed at least, short of half a per cent of it; give this, `units` or `latency_ms`.",
    )
    units: StrictInt | None = Field(default=None, ge=1, description="Count removed.")
    latency_ms: StrictFloat | None = Field(
        default=None,
        gt=0,
        description="Milliseconds that one pass of the whole model may take after this step, by a measured cost table.",
    )
    on: Literal["torch", "onnxruntime"] | None = Field(
        default=None, description="With `latency_ms`: what runs the pass; torch where not said."
    )
    batch: StrictInt | None = Field(default=None, ge=1, description="With `latency_ms`: sequences in the pass; 1.")
    tokens: StrictInt | None = Field(
        default=None, ge=1, description="With `latency_ms`: tokens in each sequence; 128. Images have their own."
    )
    costs: StrictStr | None = Field(
        default=None,
        description="With `latency_ms`: a cost table that `prunekit costs` wrote; measured and kept where not given.",
    )
    of: Literal["units", "params", "flops", "kv_bytes", "latency_ms"] = Field(
        default="units",
        description="What the fraction is of. Embeddings and the head do not count.",
    )
    within: Literal["group", "kind", "model"] | None = Field(
        default=None,
        description=(
            "Where units compete: inside each group (all layers stay alike), among all units of one kind, or in the "
            "whole model. Default: group for query_heads, kv_groups and neurons, model for the rest."
        ),
    )
    multiple_of: StrictInt = Field(default=1, ge=1, description="Widths that stay are multiples of this.")
    min_keep: StrictInt = Field(default=1, ge=1, description="Units that stay in each group at least.")
    protect: tuple[StrictStr, ...] = Field(
        default=(), description="Addresses that stay, with * and ? allowed, such as `blocks.0.*`."
    )
    keep_alternating: StrictBool = Field(
        default=False,
        description=(
            "With `remove: sublayers`: only pairs of neighbours go, half a block apart too, so that attention and FFN "
            "take turns and the result is a shorter stock model."
        ),
    )


class Step(Part):
    """One removal."""

    remove: Kind = Field(description="Kind of unit that goes.")
    by: Method = Field(description="The method that chooses: a score or a search, with its knobs.")
    budget: Budget = Field(description="How much goes, of what, and what stays.")

    @model_validator(mode="before")
    @classmethod
    def _fill_within(cls, data: Any) -> Any:
        budget = data.get("budget") if isinstance(data, Mapping) else None
        if not isinstance(budget, Mapping) or budget.get("within") is not None:
            return data
        within = "group" if data.get("remove") in WIDTH_KINDS else "model"
        return {**data, "budget": {**budget, "within": within}}


class Export(Part):
    """What is written."""

    formats: tuple[Literal["safetensors", "onnx", "gguf", "deci", "genai", "masked"], ...] = Field(
        default=("safetensors",),
        min_length=1,
        description="Formats; each but safetensors goes to a folder of its name in the output.",
    )
    gguf_type: Literal["auto", "f32", "f16", "bf16", "q8_0"] = Field(
        default="auto", description="Type of matrices in the GGUF file; `auto` is that of the checkpoint."
    )
    layout: Literal["auto", "stock", "heterogeneous"] = Field(
        default="auto", description="`stock` fails where the stock class could not load the result."
    )
    max_shard_bytes: StrictInt = Field(default=5_000_000_000, ge=1, description="Largest weight file.")


class Recipe(Part):
    """A whole pruning run as data."""

    schema_: Literal[1] = Field(alias="schema", description="Version of this format.")
    name: StrictStr | None = Field(default=None, description="Name of the recipe.")
    description: StrictStr | None = Field(default=None, description="One sentence for `prunekit recipes list`.")
    model: Model = Field(description="Which model is pruned, and how it is loaded.")
    calibrate: Calibrate = Field(default=Calibrate(), description="Text that methods run the model on.")
    steps: tuple[Step, ...] = Field(
        default=(), description="Removals, one after the other; none only where `learn` or `vocab` removes."
    )
    learn: Learn | None = Field(default=None, description="Masks learned by training, after the steps.")
    vocab: Vocab | None = Field(
        default=None, description="Vocabulary rows that a text does not need go, after the steps."
    )
    require: tuple[Target, ...] = Field(
        default=(),
        description="Where the result must load; the steps obey what is needed for that, or the recipe fails at once.",
    )
    repair: Repair | None = Field(default=None, description="What makes up for the cut, without training.")
    heal: Heal | None = Field(default=None, description="Training after the cut and the repair.")
    runtime: Runtime | None = Field(default=None, description="What the result reads while it runs; null is all.")
    evaluate: Evaluate = Field(default=Evaluate(), description="What is measured before and after.")
    export: Export = Field(default=Export(), description="Formats and layout that are written.")
    expect: Expect = Field(default=Expect(), description="Limits that the result must keep.")

    def effective(self) -> dict[str, Any]:
        """The recipe with every default written out, method knobs too; reading it again gives the same recipe."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        for step, written in zip(self.steps, data["steps"], strict=True):
            written["by"] = {
                step.by.role: step.by.name,
                **_all_knobs(REGISTRIES[step.by.role], step.by.name, step.by.knobs),
            }
        for asked, measured in zip(self.evaluate.tasks or (), data["evaluate"].get("tasks", ()), strict=True):
            measured |= _all_knobs(TASKS, asked.task, asked.options)
        if self.repair is not None:
            knobs = _all_knobs(REPAIRS, self.repair.method, self.repair.knobs)
            data["repair"] = {"method": self.repair.method, **knobs, **data["repair"], **knobs}
        if self.runtime is not None:
            chosen = self.runtime.attention
            data["runtime"]["attention"] |= _all_knobs(PATTERNS, chosen.pattern, chosen.options)
        for section, registry in ((self.learn, GATES), (self.heal, HEALS)):
            if section is not None:
                knobs = _all_knobs(registry, section.method, section.knobs)
                name = section.section
                data[name] = {"method": section.method, **knobs, **data[name], **knobs}
        if self.heal is not None and self.heal.attention is not None:
            way = self.heal.attention
            data["heal"]["attention"] = {"method": way.method, **_all_knobs(ATTENTIONS, way.method, way.knobs)}
        return {key: value for key, value in data.items() if value not in ({}, [])}


def _all_knobs(registry: Registry, name: str, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """A method's knobs with defaults written out."""
    adapter: TypeAdapter[Any] = TypeAdapter(registry.get(name))
    return dict(adapter.dump_python(adapter.validate_python(knobs), mode="json"))
