"""Text classification by a linear probe on frozen vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import UsageError
from prunekit.evaluate.figures import Figure

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.rows import Row
    from prunekit.evaluate.subject import Subject

# A label beyond this is a mistake in the file; each class takes a row of weights.
_MOST_CLASSES = 10_000


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Probe:
    """Accuracy of logistic regression on mean-pooled last hidden states, fitted on one file and judged on another.

    Rows hold `text` and `label`, counted from 0. The regression has a penalty of half the squared weights beside the
    summed loss, as scikit-learn's default has.

    Args:
        data: a .jsonl file to judge on, or `subjectivity_dev`, which comes with prunekit.
        train: a .jsonl file to fit on, or `subjectivity_train`.
        limit: rows judged, from the start of the file; null takes all.
        train_limit: rows fitted on; null takes all.
        length_tokens: longest text, special tokens included; longer ones are cut. Null cuts nothing, and a text longer
            than the model's positions is an error.
    """

    data: Annotated[str, Field(min_length=1, strict=True)] = "subjectivity_dev"
    train: Annotated[str, Field(min_length=1, strict=True)] = "subjectivity_train"
    limit: Annotated[int, Field(ge=1, strict=True)] | None = None
    train_limit: Annotated[int, Field(ge=2, strict=True)] | None = None
    length_tokens: Annotated[int, Field(ge=2, strict=True)] | None = None

    reads: ClassVar[tuple[str, ...]] = ("sentences", "text")
    backends: ClassVar[tuple[str, ...]] = ("torch", "onnx")
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("acc",)

    def load(self) -> tuple[Sequence[Row], Sequence[Row]]:
        """Rows to fit on and rows to judge on, each checked."""
        from prunekit.evaluate.rows import read_rows

        train, dev = read_rows(self.train, self.train_limit), read_rows(self.data, self.limit)
        for row in train:
            row.text("text")
            row.label(_MOST_CLASSES)
        known = {row.label(_MOST_CLASSES) for row in train}
        if len(known) < 2:
            raise UsageError(f"`{self.train}` has one class only", why="a probe tells classes apart")
        for row in dev:
            row.text("text")
            if row.label(_MOST_CLASSES) not in known:
                raise row.wrong(f"`label: {row.label(_MOST_CLASSES)}` is not in `{self.train}`")
        return train, dev

    def prepare(self, data: Any, subject: Subject) -> tuple[list[list[int]], list[list[int]]]:
        """Texts to fit on, then those to judge on, as tokens; and the labels of both."""
        from prunekit.evaluate.features import encoded

        train, dev = data
        texts = [encoded(subject, row.text("text"), row.at, self.length_tokens) for row in (*train, *dev)]
        return texts, [[row.label(_MOST_CLASSES) for row in part] for part in (train, dev)]

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Share of rows classified rightly."""
        import torch

        from prunekit.evaluate.features import text_vectors
        from prunekit.evaluate.probe import linear_probe

        texts, (train, dev) = prepared
        vectors = text_vectors(subject, texts, progress)
        found = linear_probe(vectors[: len(train)], torch.tensor(train), vectors[len(train) :], max(train) + 1)
        right = (found == torch.tensor(dev)).double().tolist()
        return {"acc": Figure.of("mean", right, better="higher")}
