"""What the generative tasks share: questions drawn from a seed, answered greedily, judged by exact match."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from prunekit.evaluate.figures import Figure
from prunekit.evaluate.generation import continuations

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.subject import Subject

Count = Annotated[int, Field(ge=1, strict=True)]
# Drawn without repeats from WORDS.
WordCount = Annotated[int, Field(ge=1, le=48, strict=True)]
Seed = Annotated[int, Field(ge=0, strict=True)]

_WORDS = """
river stone lamp garden paper window bread silver music winter table orange forest letter bridge cotton engine
market pencil island summer bottle mirror castle butter candle dinner flower hammer jacket kitchen ladder
monkey needle office pocket rabbit school ticket valley wagon yellow anchor basket circle doctor evening
finger glass honey insect jungle kettle lemon meadow nature ocean piano queen rocket
"""
WORDS = tuple(_WORDS.split())
# Tokens written beyond the answer's own, for a space or a line break that comes before.
_SPARE_TOKENS = 4


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that must follow it."""

    prompt: str
    answer: str


def generator(name: str, seed: int) -> random.Random:
    """Random numbers that belong to one task and one seed on every machine."""
    return random.Random(f"prunekit/{name}/{seed}")


def prepared(questions: Sequence[Question], subject: Subject) -> tuple[list[list[int]], list[str], int]:
    """Prompts as tokens, answers, and how many tokens are written.

    Raises:
        UsageError: where a prompt with its answer is longer than the model reads.
    """
    prompts = [subject.encode(question.prompt) for question in questions]
    new_tokens = _SPARE_TOKENS + max(len(subject.encode(" " + q.answer, special=False)) for q in questions)
    longest = max(map(len, prompts)) + new_tokens
    subject.require_positions(longest, "a prompt with its answer")
    return prompts, [question.answer for question in questions], new_tokens


def correct(asked: tuple[list[list[int]], list[str], int], subject: Subject, progress: Progress) -> list[float]:
    """1.0 for each question whose written text begins with the answer, else 0.0."""
    prompts, answers, new_tokens = asked
    written = continuations(subject.model, prompts, new_tokens, subject.batch_size, progress)
    texts = [str(subject.tokenizer.decode(ids, skip_special_tokens=True)) for ids in written]
    return [float(begins_with(text, answer)) for text, answer in zip(texts, answers, strict=True)]


def begins_with(text: str, answer: str) -> bool:
    """Whether a text begins with an answer that ends there: `12` begins `12, 13`, not `123`."""
    text = text.lstrip()
    after = text[len(answer) : len(answer) + 1]
    return text.startswith(answer) and not (after.isalnum() and answer[-1].isalnum())


def accuracy(values: Sequence[float]) -> Mapping[str, Figure]:
    """The figure that most generative tasks give."""
    return {"acc": Figure.of("mean", values, better="higher")}


class Exact:
    """What tasks share whose questions have one answer: a task adds options, and draws questions in `load`."""

    reads: ClassVar[tuple[str, ...]] = ("text",)
    backends: ClassVar[tuple[str, ...]] = ("torch", "onnx")
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("acc",)

    def prepare(self, data: list[tuple[str, str]], subject: Subject) -> Any:
        """Prompts as tokens, answers, and how many tokens are written."""
        return prepared([Question(*entry) for entry in data], subject)

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Share of questions answered exactly."""
        return accuracy(correct(prepared, subject, progress))
