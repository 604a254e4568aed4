"""How much each sub-layer matters alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.types import Panel
from prunekit.evaluate.diagnostics._subject import Subject
from prunekit.search._evaluator import Evaluator

_BATCH = 8


@dataclass(frozen=True)
class Sensitivity:
    """Distance of the model's outputs from its own when one sub-layer alone is passed over.

    Args:
        distance: one of FinerCut's; "" takes Jensen-Shannon where the model has logits, else the angle.
    """

    distance: str = ""

    source: ClassVar[str] = "FinerCut, https://arxiv.org/abs/2405.18218: its first round"
    differs: ClassVar[str] = "nothing is removed afterwards"

    def measure(self, subject: Subject, progress: Progress = NULL_PROGRESS) -> tuple[Panel, ...]:
        """Distance by block, one curve for attention and one for FFN."""
        stack = subject.stack
        evaluator = Evaluator(stack, subject.inputs, lambda address, of: 0.0)
        first = {name: value[:1] for name, value in subject.inputs.items()}
        distance = self.distance or ("js" if stack.has_logits(stack.enter(first)) else "angular")
        found: dict[str, float] = {}
        with progress.task("sensitivity", total=len(stack.addresses), unit="sub-layers") as task:
            evaluator.begin(distance)
            for begin in range(0, len(stack.addresses), _BATCH):
                some = stack.addresses[begin : begin + _BATCH]
                found.update(zip(some, evaluator.distances([(address,) for address in some]), strict=True))
                task.advance(len(some))
        blocks = tuple(dict.fromkeys(address.rpartition(".")[0] for address in stack.addresses))
        kinds = ("attention", "ffn")
        values = tuple(tuple(found.get(f"{block}.{kind}") for kind in kinds) for block in blocks)
        return (
            Panel(
                "sensitivity",
                f"outputs without the sub-layer ({distance} distance)",
                "",
                "curve",
                blocks,
                kinds,
                values,
            ),
        )
