"""The recipe as frozen models: what may be written, of which type, in which range.

What one field cannot know (two keys that exclude each other, a method and its knobs) is checked in `recipe_check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    model_serializer,
    model_validator,
)

from prunekit.core.registry import HEALS, REPAIRS, SCORES, SEARCHES, TASKS, Registry

Kind = Literal["blocks", "sublayers", "attention", "ffn", "query_heads", "kv_groups", "neurons", "experts"]
WIDTH_KINDS = ("query_heads", "kv_groups", "neurons", "experts")
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


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _named_text(data: Any) -> Any:
    return {"data": data} if isinstance(data, str) else data


class Model(_Part):
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
    trust_remote_code: StrictBool = Field(
        default=False, description="Run the code that the model's folder brings along."
    )


class Select(_Part):
    """Which sequences of the data are calibrated on; `sequences` of them stay, and more are read."""

    metric: StrictStr = Field(
        description="Metric of data pruning that needs no labels: loss, perplexity, ssl_prototypes, length or random."
    )
    keep: StrictFloat = Field(gt=0, le=1, description="Fraction kept of the sequences that are read.")
    rule: Literal["hard", "easy", "auto"] = Field(
        default="auto", description="Keep the highest scores, the lowest, or decide by how much text there is."
    )


class Calibrate(_Part):
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


class Method(_Part):
    """The method that chooses, by registry name, with its knobs beside the name."""

    score: StrictStr | None = Field(default=None, description="Method that scores units; the lowest go.")
    search: StrictStr | None = Field(
        default=None, description="Method that runs the cut model to decide what goes next."
    )
    knobs: dict[str, Any] = Field(default_factory=dict, description="Knobs of the method.")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        named = {key: data[key] for key in ("score", "search") if key in data}
        return {**named, "knobs": {key: value for key, value in data.items() if key not in named}}

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


class Repair(_Part):
    """What makes up for the cut in closed form, by registry name, with its knobs beside the name."""

    method: StrictStr = Field(description="Method that fits new weights once all steps are planned.")
    calibrate: Calibrate = Field(
        default=Calibrate(sequences=64), description="What it is fitted on; 64 sequences where not said."
    )
    knobs: dict[str, Any] = Field(default_factory=dict, description="Knobs of the method.")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        named = {key: data[key] for key in ("method", "calibrate") if key in data}
        return {**named, "knobs": {key: value for key, value in data.items() if key not in named}}

    @model_serializer
    def _flatten(self) -> dict[str, Any]:
        return {"method": self.method, **self.knobs, "calibrate": self.calibrate.model_dump()}


class HealText(_Part):
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
    _short = model_validator(mode="before")(_named_text)


class Heal(_Part):
    """Training after the cut, by registry name, with the method's knobs beside the name."""

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
    train: Literal["all", "lora"] = Field(
        default="all", description="All weights, or adapters of low rank that are merged into them at the end."
    )
    lora_rank: StrictInt = Field(default=16, ge=1, description="Rank of the adapters.")
    lora_alpha: StrictFloat = Field(default=32.0, gt=0, description="The adapters' scale is this over their rank.")
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
        if not isinstance(data, Mapping):
            return data
        named = {key: value for key, value in data.items() if key in cls.model_fields and key != "knobs"}
        if isinstance(named.get("data"), str | Mapping):
            named["data"] = [named["data"]]
        return {**named, "knobs": {key: value for key, value in data.items() if key not in named}}

    @model_serializer
    def _flatten(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in type(self).model_fields if name not in ("data", "knobs")}
        texts = [text.model_dump(exclude_none=True) for text in self.data]
        known = {key: value for key, value in plain.items() if value is not None}
        return {"method": self.method, **self.knobs, "data": texts, **known}


class Budget(_Part):
    """How much goes."""

    remove: StrictFloat | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Fraction removed at least, short of half a per cent of it; give this or `units`.",
    )
    units: StrictInt | None = Field(default=None, ge=1, description="Count removed; give this or `remove`.")
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


class Step(_Part):
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


class Perplexity(_Part):
    """Perplexity of the model before and after; a bare text names the data."""

    data: StrictStr = Field(default="wikitext2_eval", min_length=1, description="As for `calibrate.data`.")
    sequences: StrictInt = Field(default=20, ge=1, description="How many sequences.")
    length_tokens: StrictInt = Field(default=512, ge=2, description="Tokens in each sequence; the first is not scored.")
    stride_tokens: StrictInt | None = Field(
        default=None, ge=1, description="By how much a window lies behind the one before; null lets them not overlap."
    )
    _short = model_validator(mode="before")(_named_text)


class Embedding(_Part):
    """Cosine between the sentence embeddings of both models; a bare text names the data."""

    data: StrictStr = Field(default="wikitext2_eval", min_length=1, description="As for `calibrate.data`.")
    sequences: StrictInt = Field(default=64, ge=1, description="How many sentences.")
    length_tokens: StrictInt = Field(default=128, ge=2, description="Longest sentence, in tokens; longer ones are cut.")
    _short = model_validator(mode="before")(_named_text)


class Latency(_Part):
    """Tokens a second while reading the prompt and while writing."""

    batch: StrictInt = Field(default=1, ge=1, description="Sequences at once.")
    prompt_tokens: StrictInt = Field(default=128, ge=1, description="Tokens read.")
    new_tokens: StrictInt = Field(default=32, ge=1, description="Tokens written.")
    repeats: StrictInt = Field(default=3, ge=1, description="Measurements; the median counts.")


class Sample(_Part):
    """A greedy continuation by both models."""

    prompt: StrictStr = Field(min_length=1, description="Text to continue.")
    new_tokens: StrictInt = Field(default=40, ge=1, description="Tokens written.")


class Measurement(_Part):
    """A task by name, its options beside the name."""

    task: StrictStr = Field(description="Name of the task.")
    name: StrictStr | None = Field(
        default=None, min_length=1, description="What its figures go by; null takes the stem of its data, or the task."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the task.")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"task": data}
        if not isinstance(data, Mapping):
            return data
        named = {key: data[key] for key in ("task", "name") if key in data}
        return {**named, "options": {key: value for key, value in data.items() if key not in named}}

    @model_serializer
    def _flatten(self) -> dict[str, Any]:
        return {"task": self.task, **({"name": self.name} if self.name else {}), **self.options}


class Evaluate(_Part):
    """What is measured before and after; what is not named is not measured."""

    perplexity: Perplexity | None = Field(default=None, description="For models that write text.")
    embedding: Embedding | None = Field(default=None, description="For encoders.")
    latency: Latency | None = Field(default=None, description="Speed.")
    sample: Sample | None = Field(default=None, description="A continuation to read.")
    tasks: tuple[Measurement, ...] | None = Field(
        default=None, description="Tasks of `prunekit evaluate`, each a name or `{task: NAME, ...}` with its options."
    )


class Export(_Part):
    """What is written."""

    formats: tuple[Literal["safetensors", "onnx"], ...] = Field(
        default=("safetensors",), min_length=1, description="Formats; ONNX goes to the folder `onnx` in the output."
    )
    layout: Literal["auto", "stock", "heterogeneous"] = Field(
        default="auto", description="`stock` fails where the stock class could not load the result."
    )
    max_shard_bytes: StrictInt = Field(default=5_000_000_000, ge=1, description="Largest weight file.")


@dataclass(frozen=True)
class Expectation:
    """How one `expect` key is judged.

    Args:
        measure: name of the measured value.
        sense: `max`: at most the limit; `min`: at least; `is`: equal.
        needs: key of the recipe without which nothing measures it, as a path; empty if it is always known.
    """

    measure: str
    sense: Literal["max", "min", "is"]
    needs: str = ""


EXPECTATIONS: dict[str, Expectation] = {
    "params_max": Expectation("params", "max"),
    "block_params_max": Expectation("block_params", "max"),
    "file_bytes_max": Expectation("file_bytes", "max"),
    "flops_per_token_max": Expectation("flops_per_token", "max"),
    "kv_bytes_per_token_max": Expectation("kv_bytes_per_token", "max"),
    "perplexity_max": Expectation("perplexity", "max", "evaluate.perplexity"),
    "embedding_cosine_min": Expectation("embedding_cosine", "min", "evaluate.embedding"),
    "prefill_tokens_s_min": Expectation("prefill_tokens_s", "min", "evaluate.latency"),
    "decode_tokens_s_min": Expectation("decode_tokens_s", "min", "evaluate.latency"),
    "onnx_max_abs_diff": Expectation("onnx_max_abs_diff", "max", "export.formats"),
    "onnx_bytes_max": Expectation("onnx_bytes", "max", "export.formats"),
    "loads_stock": Expectation("loads_stock", "is"),
}


class Expect(_Part):
    """Limits that the result must keep; exit code 3 where it misses one."""

    params_max: StrictFloat | None = Field(default=None, gt=0, description="Parameters.")
    block_params_max: StrictFloat | None = Field(default=None, gt=0, description="Parameters inside blocks.")
    file_bytes_max: StrictFloat | None = Field(default=None, gt=0, description="Bytes of the weight files.")
    flops_per_token_max: StrictFloat | None = Field(default=None, gt=0, description="FLOPs a token.")
    kv_bytes_per_token_max: StrictFloat | None = Field(default=None, ge=0, description="Bytes of KV cache a token.")
    perplexity_max: StrictFloat | None = Field(default=None, gt=0, description="Needs `evaluate.perplexity`.")
    embedding_cosine_min: StrictFloat | None = Field(
        default=None, ge=-1, le=1, description="Mean cosine; needs `evaluate.embedding`."
    )
    prefill_tokens_s_min: StrictFloat | None = Field(default=None, gt=0, description="Needs `evaluate.latency`.")
    decode_tokens_s_min: StrictFloat | None = Field(default=None, gt=0, description="Needs `evaluate.latency`.")
    onnx_max_abs_diff: StrictFloat | None = Field(
        default=None, gt=0, description="Largest difference between ONNX Runtime and torch; needs the format `onnx`."
    )
    onnx_bytes_max: StrictFloat | None = Field(default=None, gt=0, description="Bytes of the ONNX files; needs `onnx`.")
    loads_stock: Literal[True] | None = Field(default=None, description="The stock class loads the result.")
    figures: dict[str, StrictFloat] | None = Field(
        default=None, description="Limits of `evaluate.tasks`: `arc_easy.acc_min: 0.4` or `lambada.perplexity_max: 30`."
    )

    def judge(self, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One entry a limit: `name`, `limit`, `value` (None where nothing measured it: missed) and `ok`.

        Args:
            measured: values of the result by the names in `EXPECTATIONS`, and under `figures` those of tasks by
                `label.figure`.
        """
        entries = []
        for name, rule in EXPECTATIONS.items():
            limit, value = getattr(self, name), measured.get(rule.measure)
            if limit is None:
                continue
            if value is None:
                ok = False
            elif rule.sense == "is":
                ok = value is limit
            else:
                ok = bool(value <= limit if rule.sense == "max" else value >= limit)
            entries.append({"name": name, "limit": limit, "value": value, "ok": ok})
        for name, limit in (self.figures or {}).items():
            figure, _, sense = name.rpartition("_")
            value = measured.get("figures", {}).get(figure)
            ok = value is not None and bool(value <= limit if sense == "max" else value >= limit)
            entries.append({"name": name, "limit": limit, "value": value, "ok": ok})
        return entries


class Recipe(_Part):
    """A whole pruning run as data."""

    schema_: Literal[1] = Field(alias="schema", description="Version of this format.")
    name: StrictStr | None = Field(default=None, description="Name of the recipe.")
    description: StrictStr | None = Field(default=None, description="One sentence for `prunekit recipes list`.")
    model: Model = Field(description="Which model is pruned, and how it is loaded.")
    calibrate: Calibrate = Field(default=Calibrate(), description="Text that methods run the model on.")
    steps: tuple[Step, ...] = Field(min_length=1, description="Removals, one after the other.")
    require: tuple[Target, ...] = Field(
        default=(),
        description="Where the result must load; the steps obey what is needed for that, or the recipe fails at once.",
    )
    repair: Repair | None = Field(default=None, description="What makes up for the cut, without training.")
    heal: Heal | None = Field(default=None, description="Training after the cut and the repair.")
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
            data["repair"] = {**data["repair"], **knobs}
        if self.heal is not None:
            data["heal"] = {**data["heal"], **_all_knobs(HEALS, self.heal.method, self.heal.knobs)}
        return {key: value for key, value in data.items() if value != {}}


def _all_knobs(registry: Registry, name: str, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """A method's knobs with defaults written out."""
    adapter: TypeAdapter[Any] = TypeAdapter(registry.get(name))
    return dict(adapter.dump_python(adapter.validate_python(knobs), mode="json"))
