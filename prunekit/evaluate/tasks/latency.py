"""Speed: reading a prompt and writing after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.evaluate.figures import Figure

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.subject import Subject

Count = Annotated[int, Field(ge=1, strict=True)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Latency:
    """Tokens a second and milliseconds, medians (p50) and 95th percentiles, on random tokens or images.

    Prefill percentiles are over repeats, decode percentiles over the steps of all repeats. Encoders only read.

    Args:
        batch: sequences at once.
        prompt_tokens: tokens read in each sequence.
        new_tokens: tokens written in each sequence.
        repeats: measurements; one that does not count comes first.
    """

    batch: Count = 1
    prompt_tokens: Count = 128
    new_tokens: Count = 32
    repeats: Count = 3

    reads: ClassVar[tuple[str, ...]] = ("text", "sentences", "images")
    backends: ClassVar[tuple[str, ...]] = ("torch", "onnx")
    limits: ClassVar[str] = ""
    machine_bound: ClassVar[bool] = True
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = (
        "prefill_tokens_s",
        "decode_tokens_s",
        "prefill_p50_ms",
        "prefill_p95_ms",
        "decode_p50_ms",
        "decode_p95_ms",
    )

    def load(self) -> None:
        """Nothing: tokens are drawn."""

    def prepare(self, data: None, subject: Subject) -> None:
        """Checks the length."""
        if subject.kind != "images":
            total = self.prompt_tokens + (self.new_tokens if subject.kind == "text" else 0)
            subject.require_positions(total, "what `latency` reads and writes", hint="lower `prompt_tokens`")

    def run(self, prepared: None, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Figures that the model has: an encoder has no decode."""
        from prunekit.evaluate.latency import measure_latency

        found = measure_latency(subject.model, self.batch, self.prompt_tokens, self.new_tokens, self.repeats, progress)
        values = {
            "prefill_tokens_s": found.prefill_tokens_s,
            "decode_tokens_s": found.decode_tokens_s,
            "prefill_p50_ms": found.prefill_ms,
            "prefill_p95_ms": found.prefill_p95_ms,
            "decode_p50_ms": found.decode_p50_ms,
            "decode_p95_ms": found.decode_p95_ms,
        }
        return {
            name: Figure(value, "higher", "tokens/s") if name.endswith("tokens_s") else Figure(value, "lower", "ms")
            for name, value in values.items()
            if value is not None
        }
