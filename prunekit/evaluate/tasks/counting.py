"""Counting on."""

from __future__ import annotations

import random

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.evaluate.tasks import _canary
from prunekit.evaluate.tasks._canary import Count, Exact, Seed


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Counting(Exact):
    """Share of rows of whole numbers that the model continues exactly.

    Args:
        limit: questions.
        steps: numbers it must write.
        seed: of the questions.
    """

    limit: Count = 100
    steps: Count = 6
    seed: Seed = 0

    def load(self) -> list[tuple[str, str]]:
        """Prompts and answers, drawn from the seed."""
        draw = _canary.generator("counting", self.seed)
        return [_question(draw, self.steps) for _ in range(self.limit)]


def _question(draw: random.Random, steps: int) -> tuple[str, str]:
    first = draw.randint(1, 180)
    numbers = [str(number) for number in range(first, first + 6 + steps)]
    return ", ".join(numbers[:6]) + ",", ", ".join(numbers[6:])
