"""Counting on."""

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
class Counting:
    """Share of rows of whole numbers that the model continues exactly.

    Args:
        limit: questions.
        steps: numbers it must write.
        seed: of the questions.
    """

    limit: Count = 100
    steps: Count = 6
    seed: Seed = 0

    reads: ClassVar[tuple[str, ...]] = ("text",)
    backends: ClassVar[tuple[str, ...]] = ("torch",)
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("acc",)

    def load(self) -> list[tuple[str, str]]:
        """Prompts and answers, drawn from the seed."""
        draw = _canary.generator("counting", self.seed)
        return [_question(draw, self.steps) for _ in range(self.limit)]

    def prepare(self, data: list[tuple[str, str]], subject: Subject) -> Any:
        """Prompts as tokens, answers, and how many tokens are written."""
        return _canary.prepared([Question(*entry) for entry in data], subject)

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Share of questions answered exactly."""
        return _canary.accuracy(_canary.correct(prepared, subject, progress))


def _question(draw: random.Random, steps: int) -> tuple[str, str]:
    first = draw.randint(1, 180)
    numbers = [str(number) for number in range(first, first + 6 + steps)]
    return ", ".join(numbers[:6]) + ",", ", ".join(numbers[6:])
