"""What every task gives, and the digest that says what it measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from prunekit.core.progress import Progress
from prunekit.evaluate.figures import Figure
from prunekit.evaluate.subject import Subject


class Task(Protocol):
    """One thing that is measured. A task is a frozen pydantic dataclass: its fields are its options.

    `load` and `prepare` find everything that is wrong with the data before a model is loaded.

    Args:
        reads: kinds of models it is for, names of `subject.KINDS`.
        backends: `torch`, and `onnx` where it can measure an exported folder.
        limits: option that `--limit` lowers; empty for none.
        machine_bound: whether another machine gives other figures.
        version: counted up when the same data and options come to give other figures, so that no old one is reused.
    """

    reads: ClassVar[tuple[str, ...]]
    backends: ClassVar[tuple[str, ...]]
    limits: ClassVar[str]
    machine_bound: ClassVar[bool]
    version: ClassVar[int]

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures it gives; empty where only a run tells."""

    def load(self) -> Any:
        """Reads and checks the data, without a model.

        Returns:
            Plain values; their JSON goes into the digest of the result.
        Raises:
            UsageError: for data that is missing or wrong, with its line.
        """

    def prepare(self, data: Any, subject: Subject) -> Any:
        """What the model reads, from its tokenizer and configuration alone.

        Raises:
            UsageError: where the data does not fit the model.
        """

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Measures.

        Raises:
            EvaluationError: where the model's outputs are no numbers.
        """


def digest(value: Any) -> str:
    """SHA-256 of a plain value's JSON, keys sorted, hexadecimal."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if hasattr(value, "fields"):
        return dict(value.fields)
    raise TypeError(f"{type(value).__name__} is no plain value")
