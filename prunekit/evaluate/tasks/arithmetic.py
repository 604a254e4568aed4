"""Addition and subtraction of two-digit numbers, after four examples."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.evaluate.tasks import _canary
from prunekit.evaluate.tasks._canary import Count, Question, Seed

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.figures import Figure
    from prunekit.evaluate.subject import Subject


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Arithmetic:
    """Share of sums and differences of two-digit numbers that the model writes exactly; no result is below zero.

    Args:
        limit: questions.
        seed: of the questions.
    """

    limit: Count = 100
    seed: Seed = 0

    reads: ClassVar[tuple[str, ...]] = ("text",)
    backends: ClassVar[tuple[str, ...]] = ("torch",)
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("acc",)

    def load(self) -> list[tuple[str, str]]:
        """Prompts and answers, drawn from the seed."""
        draw = _canary.generator("arithmetic", self.seed)
        return [_question(draw) for _ in range(self.limit)]

    def prepare(self, data: list[tuple[str, str]], subject: Subject) -> Any:
        """Prompts as tokens, answers, and how many tokens are written."""
        return _canary.prepared([Question(*entry) for entry in data], subject)

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Share of questions answered exactly."""
        return _canary.accuracy(_canary.correct(prepared, subject, progress))


def _question(draw: random.Random) -> tuple[str, str]:
    terms = [_term(draw) for _ in range(5)]
    shown = "".join(f"{text} = {result}\n" for text, result in terms[:4])
    return f"{shown}{terms[4][0]} =", str(terms[4][1])


def _term(draw: random.Random) -> tuple[str, int]:
    a, b = draw.randint(10, 99), draw.randint(10, 99)
    if draw.random() < 0.5:
        return f"{a} + {b}", a + b
    a, b = max(a, b), min(a, b)
    return f"{a} - {b}", a - b
