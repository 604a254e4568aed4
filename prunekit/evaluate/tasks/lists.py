"""Repetition of a list."""

from __future__ import annotations

import random

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.evaluate.tasks import _canary
from prunekit.evaluate.tasks._canary import Count, Exact, Seed, WordCount


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Lists(Exact):
    """Share of lists that the model says a third time exactly, after two rounds.

    Args:
        limit: questions.
        items: words in the list, at most 48.
        seed: of the questions.
    """

    limit: Count = 100
    items: WordCount = 6
    seed: Seed = 0

    def load(self) -> list[tuple[str, str]]:
        """Prompts and answers, drawn from the seed."""
        draw = _canary.generator("lists", self.seed)
        return [_question(draw, self.items) for _ in range(self.limit)]


def _question(draw: random.Random, items: int) -> tuple[str, str]:
    listed = ", ".join(draw.sample(_canary.WORDS, items))
    return f"{listed}; {listed};", listed
