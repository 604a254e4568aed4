"""The last word of a passage (LAMBADA): what the model would write next, greedily."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.evaluate.figures import Figure

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.likelihood import Request
    from prunekit.evaluate.rows import Row
    from prunekit.evaluate.subject import Subject


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Cloze:
    """Share of rows where every token of `target` is the model's first choice, and the targets' perplexity.

    Rows hold `context` and `target`, its leading space included. The perplexity is exp of the mean negative
    log-likelihood of a whole target.

    Args:
        data: a .jsonl file, or `lambada`, which comes with prunekit.
        limit: rows, from the start of the file; null takes all.
    """

    data: Annotated[str, Field(min_length=1, strict=True)] = "lambada"
    limit: Annotated[int, Field(ge=1, strict=True)] | None = None

    reads: ClassVar[tuple[str, ...]] = ("text",)
    backends: ClassVar[tuple[str, ...]] = ("torch", "onnx")
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("acc", "perplexity")

    def load(self) -> Sequence[Row]:
        """Rows, each checked."""
        from prunekit.evaluate.rows import read_rows

        rows = read_rows(self.data, self.limit)
        for row in rows:
            row.text("context", empty=True)
            row.text("target")
        return rows

    def prepare(self, data: Sequence[Row], subject: Subject) -> list[Request]:
        """One request a row."""
        from prunekit.evaluate.likelihood import split_request

        requests = []
        for row in data:
            request = split_request(subject.tokenizer, row.text("context", empty=True), row.text("target"))
            subject.require_positions(len(request), "a row", row.at, "take the row out")
            requests.append(request)
        return requests

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Figures over rows."""
        from prunekit.evaluate.likelihood import likelihoods

        found = likelihoods(subject.model, prepared, subject.batch_size, progress)
        nll = [-entry.logprob for entry in found]
        return {
            "acc": Figure.of("mean", [float(entry.greedy) for entry in found], better="higher"),
            "perplexity": Figure.of("exp_mean", nll, [1.0] * len(nll), better="lower"),
        }
