"""Semantic textual similarity: whether vectors rank pairs of sentences as people do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import EvaluationError
from prunekit.evaluate.figures import Figure

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.rows import Row
    from prunekit.evaluate.subject import Subject


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Similarity:
    """Spearman correlation of the cosine of mean-pooled last hidden states with a score (STS).

    Rows hold the texts `s1` and `s2` and a number `score`.

    Args:
        data: a .jsonl file.
        limit: rows, from the start of the file; null takes all.
        length_tokens: longest text, special tokens included; longer ones are cut. Null cuts nothing, and a text longer
            than the model's positions is an error.
    """

    data: Annotated[str, Field(min_length=1, strict=True)]
    limit: Annotated[int, Field(ge=3, strict=True)] | None = None
    length_tokens: Annotated[int, Field(ge=2, strict=True)] | None = None

    reads: ClassVar[tuple[str, ...]] = ("sentences", "text")
    backends: ClassVar[tuple[str, ...]] = ("torch", "onnx")
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("spearman",)

    def load(self) -> Sequence[Row]:
        """Rows, each checked."""
        from prunekit.core.errors import UsageError
        from prunekit.evaluate.rows import read_rows

        rows = read_rows(self.data, self.limit)
        for row in rows:
            row.text("s1")
            row.text("s2")
            row.number("score")
        if len({row.number("score") for row in rows}) < 2:
            raise UsageError(f"`{self.data}` ranks nothing", why="all its scores are equal")
        return rows

    def prepare(self, data: Sequence[Row], subject: Subject) -> tuple[list[list[int]], list[float]]:
        """First texts, then second ones, as tokens; and the scores."""
        from prunekit.evaluate.features import encoded

        texts = [encoded(subject, row.text(key), row.at, self.length_tokens) for key in ("s1", "s2") for row in data]
        return texts, [row.number("score") for row in data]

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """One figure; its examples are cosines and scores."""
        import math

        from torch.nn.functional import cosine_similarity

        from prunekit.evaluate.features import text_vectors

        texts, scores = prepared
        vectors = text_vectors(subject, texts, progress)
        cosines = cosine_similarity(vectors[: len(scores)], vectors[len(scores) :], dim=-1).tolist()
        found = Figure.of("spearman", cosines, scores, better="higher")
        if math.isnan(found.value):
            raise EvaluationError("the correlation is not a number", why="all cosines are equal")
        return {"spearman": found}
