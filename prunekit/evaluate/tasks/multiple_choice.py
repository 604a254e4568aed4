"""Multiple choice by likelihood: the choice that the model finds likeliest."""

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
class MultipleChoice:
    """Share of rows whose right choice has the largest log-likelihood, in all (acc) or a character (acc_norm).

    Rows hold `context`, `choices` and `label`; or, for partial scoring as in WinoGrande, two or more `contexts`, one
    `continuation` and `label`, where the context that makes the continuation likeliest is chosen and acc_norm is acc.
    `answer_nll` is the mean negative log-likelihood of the right choice in nats: it moves before an accuracy does.

    Args:
        data: a .jsonl file, or `arc_easy`, which comes with prunekit.
        limit: rows, from the start of the file; null takes all.
    """

    data: Annotated[str, Field(min_length=1, strict=True)] = "arc_easy"
    limit: Annotated[int, Field(ge=1, strict=True)] | None = None

    reads: ClassVar[tuple[str, ...]] = ("text",)
    backends: ClassVar[tuple[str, ...]] = ("torch", "onnx")
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("acc", "acc_norm", "answer_nll")

    def load(self) -> Sequence[Row]:
        """Rows, each checked."""
        from prunekit.evaluate.rows import read_rows

        rows = read_rows(self.data, self.limit)
        for row in rows:
            pairs = _pairs(row)
            row.label(len(pairs))
        return rows

    def prepare(self, data: Sequence[Row], subject: Subject) -> list[tuple[list[Request], list[int], int]]:
        """For each row its requests, the characters of each choice, and the label."""
        from prunekit.evaluate.likelihood import split_request

        prepared = []
        for row in data:
            pairs = _pairs(row)
            requests = [split_request(subject.tokenizer, context, choice) for context, choice in pairs]
            subject.require_positions(max(map(len, requests)), "a row", row.at, "take the row out")
            prepared.append((requests, [len(choice.removeprefix(" ")) for _, choice in pairs], row.label(len(pairs))))
        return prepared

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Figures over rows; the first of equally likely choices counts."""
        from prunekit.evaluate.likelihood import likelihoods

        flat = [request for requests, _, _ in prepared for request in requests]
        found = iter(likelihoods(subject.model, flat, subject.batch_size, progress))
        acc, norm, nll = [], [], []
        for requests, characters, label in prepared:
            logs = [next(found).logprob for _ in requests]
            each = [log / n for log, n in zip(logs, characters, strict=True)]
            acc.append(float(logs.index(max(logs)) == label))
            norm.append(float(each.index(max(each)) == label))
            nll.append(-logs[label])
        return {
            "acc": Figure.of("mean", acc, better="higher"),
            "acc_norm": Figure.of("mean", norm, better="higher"),
            "answer_nll": Figure.of("mean", nll, better="lower"),
        }


def _pairs(row: Row) -> list[tuple[str, str]]:
    """Context and continuation of every choice."""
    if "contexts" in row.fields:
        continuation = row.text("continuation")
        return [(context, continuation) for context in row.texts("contexts")]
    context = row.text("context", empty=True)
    return [(context, choice) for choice in row.texts("choices")]
