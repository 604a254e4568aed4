"""Exact copying of words, after two examples."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.evaluate.tasks import _canary
from prunekit.evaluate.tasks._canary import Count, Question, Seed, WordCount

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.figures import Figure
    from prunekit.evaluate.subject import Subject


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Copying:
    """Share of lines of random words that the model copies exactly.

    Args:
        limit: questions.
        words: words in a line, at most 48.
        seed: of the questions.
    """

    limit: Count = 100
    words: WordCount = 8
    seed: Seed = 0

    reads: ClassVar[tuple[str, ...]] = ("text",)
    backends: ClassVar[tuple[str, ...]] = ("torch",)
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("acc",)

    def load(self) -> list[tuple[str, str]]:
        """Prompts and answers, drawn from the seed."""
        draw = _canary.generator("copying", self.seed)
        return [_question(draw, self.words) for _ in range(self.limit)]

    def prepare(self, data: list[tuple[str, str]], subject: Subject) -> Any:
        """Prompts as tokens, answers, and how many tokens are written."""
        return _canary.prepared([Question(*entry) for entry in data], subject)

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Share of questions answered exactly."""
        return _canary.accuracy(_canary.correct(prepared, subject, progress))


def _question(draw: random.Random, words: int) -> tuple[str, str]:
    lines = [" ".join(draw.sample(_canary.WORDS, words)) for _ in range(3)]
    shown = "".join(f"Line: {line}\nCopy: {line}\n\n" for line in lines[:2])
    return f"{shown}Line: {lines[2]}\nCopy:", lines[2]
