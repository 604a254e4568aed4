"""The parts of a recipe that measure a result and set limits to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, StrictFloat, StrictInt, StrictStr, model_serializer, model_validator

from prunekit.core.recipe_base import Part, gathered, named_text


class Perplexity(Part):
    """Perplexity of the model before and after; a bare text names the data."""

    data: StrictStr = Field(default="wikitext2_eval", min_length=1, description="As for `calibrate.data`.")
    sequences: StrictInt = Field(default=20, ge=1, description="How many sequences.")
    length_tokens: StrictInt = Field(default=512, ge=2, description="Tokens in each sequence; the first is not scored.")
    stride_tokens: StrictInt | None = Field(
        default=None, ge=1, description="By how much a window lies behind the one before; null lets them not overlap."
    )
    _short = model_validator(mode="before")(named_text)


class KL(Part):
    """KL divergence of the result's next-token distributions from the dense model's; a bare text names the data."""

    data: StrictStr = Field(default="wikitext2_eval", min_length=1, description="As for `calibrate.data`.")
    sequences: StrictInt = Field(default=8, ge=1, description="How many sequences.")
    length_tokens: StrictInt = Field(
        default=256, ge=2, description="Tokens in each sequence; the first is not compared."
    )
    _short = model_validator(mode="before")(named_text)


class Embedding(Part):
    """Cosine between the sentence embeddings of both models; a bare text names the data."""

    data: StrictStr = Field(default="wikitext2_eval", min_length=1, description="As for `calibrate.data`.")
    sequences: StrictInt = Field(default=64, ge=1, description="How many sentences.")
    length_tokens: StrictInt = Field(default=128, ge=2, description="Longest sentence, in tokens; longer ones are cut.")
    _short = model_validator(mode="before")(named_text)


class Latency(Part):
    """Tokens a second while reading the prompt and while writing."""

    batch: StrictInt = Field(default=1, ge=1, description="Sequences at once.")
    prompt_tokens: StrictInt = Field(default=128, ge=1, description="Tokens read.")
    new_tokens: StrictInt = Field(default=32, ge=1, description="Tokens written.")
    repeats: StrictInt = Field(default=3, ge=1, description="Measurements; the median counts.")


class Sample(Part):
    """A greedy continuation by both models."""

    prompt: StrictStr = Field(min_length=1, description="Text to continue.")
    new_tokens: StrictInt = Field(default=40, ge=1, description="Tokens written.")


class Measurement(Part):
    """A task by name, its options beside the name."""

    task: StrictStr = Field(description="Name of the task.")
    name: StrictStr | None = Field(
        default=None, min_length=1, description="What its figures go by; null takes the stem of its data, or the task."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the task.")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        return {"task": data} if isinstance(data, str) else gathered(data, ("task", "name"), "options")

    @model_serializer
    def _flatten(self) -> dict[str, Any]:
        return {"task": self.task, **({"name": self.name} if self.name else {}), **self.options}


class Evaluate(Part):
    """What is measured before and after; what is not named is not measured."""

    perplexity: Perplexity | None = Field(default=None, description="For models that write text.")
    kl: KL | None = Field(default=None, description="For models that write text: how far from the dense one.")
    embedding: Embedding | None = Field(default=None, description="For encoders.")
    latency: Latency | None = Field(default=None, description="Speed.")
    sample: Sample | None = Field(default=None, description="A continuation to read.")
    tasks: tuple[Measurement, ...] | None = Field(
        default=None, description="Tasks of `prunekit evaluate`, each a name or `{task: NAME, ...}` with its options."
    )


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
    "kl_max": Expectation("kl", "max", "evaluate.kl"),
    "embedding_cosine_min": Expectation("embedding_cosine", "min", "evaluate.embedding"),
    "prefill_tokens_s_min": Expectation("prefill_tokens_s", "min", "evaluate.latency"),
    "decode_tokens_s_min": Expectation("decode_tokens_s", "min", "evaluate.latency"),
    "latency_ms_max": Expectation("latency_ms", "max"),
    "onnx_max_abs_diff": Expectation("onnx_max_abs_diff", "max", "export.formats"),
    "onnx_bytes_max": Expectation("onnx_bytes", "max", "export.formats"),
    "loads_stock": Expectation("loads_stock", "is"),
}


class Expect(Part):
    """Limits that the result must keep; exit code 3 where it misses one."""

    params_max: StrictFloat | None = Field(default=None, gt=0, description="Parameters.")
    block_params_max: StrictFloat | None = Field(default=None, gt=0, description="Parameters inside blocks.")
    file_bytes_max: StrictFloat | None = Field(default=None, gt=0, description="Bytes of the weight files.")
    flops_per_token_max: StrictFloat | None = Field(default=None, gt=0, description="FLOPs a token.")
    kv_bytes_per_token_max: StrictFloat | None = Field(default=None, ge=0, description="Bytes of KV cache a token.")
    perplexity_max: StrictFloat | None = Field(default=None, gt=0, description="Needs `evaluate.perplexity`.")
    kl_max: StrictFloat | None = Field(default=None, gt=0, description="Nats a token; needs `evaluate.kl`.")
    embedding_cosine_min: StrictFloat | None = Field(
        default=None, ge=-1, le=1, description="Mean cosine; needs `evaluate.embedding`."
    )
    prefill_tokens_s_min: StrictFloat | None = Field(default=None, gt=0, description="Needs `evaluate.latency`.")
    decode_tokens_s_min: StrictFloat | None = Field(default=None, gt=0, description="Needs `evaluate.latency`.")
    latency_ms_max: StrictFloat | None = Field(
        default=None, gt=0, description="Milliseconds of one pass; needs a budget with `latency_ms`."
    )
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
