"""Peak memory of reading a prompt and writing after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.evaluate.figures import Figure

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.subject import Subject

Count = Annotated[int, Field(ge=1, strict=True)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Memory:
    """Largest memory of the process while the model reads and writes, its weights, Python and torch included.

    On a GPU also the largest that torch's tensors took there, which leaves out what ONNX Runtime takes. What ran before
    in the same process may still hold memory that the system counts; a command of its own is the fairest measurement.

    Args:
        batch: sequences at once.
        prompt_tokens: tokens read in each sequence.
        new_tokens: tokens written in each sequence.
    """

    batch: Count = 1
    prompt_tokens: Count = 128
    new_tokens: Count = 8

    reads: ClassVar[tuple[str, ...]] = ("text", "sentences", "images")
    backends: ClassVar[tuple[str, ...]] = ("torch", "onnx")
    limits: ClassVar[str] = ""
    machine_bound: ClassVar[bool] = True
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("host_bytes", "device_bytes", "weight_bytes")

    def load(self) -> None:
        """Nothing: tokens are drawn."""

    def prepare(self, data: None, subject: Subject) -> None:
        """Checks the length."""
        if subject.kind != "images":
            total = self.prompt_tokens + (self.new_tokens if subject.kind == "text" else 0)
            subject.require_positions(total, "what `memory` reads and writes", hint="lower `prompt_tokens`")

    def run(self, prepared: None, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Bytes; `device_bytes` only on a GPU."""
        from prunekit.evaluate.latency import measure_latency
        from prunekit.evaluate.memory import peak_memory

        model = subject.model
        with peak_memory(model.device) as peak:
            measure_latency(model, self.batch, self.prompt_tokens, self.new_tokens, 1, progress)
        found = {
            "host_bytes": peak.host_bytes,
            "device_bytes": peak.device_bytes,
            "weight_bytes": weight_bytes(model),
        }
        return {name: Figure(float(v), "lower", "bytes") for name, v in found.items() if v is not None}


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights: in memory, or of an ONNX folder's files."""
    if hasattr(model, "weight_bytes"):
        return int(model.weight_bytes)
    return sum({id(p): p.numel() * p.element_size() for p in model.parameters()}.values())
