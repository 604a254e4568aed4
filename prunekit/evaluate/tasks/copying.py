"""Exact copying of words, after two examples."""

from __future__ import annotations

import random

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.evaluate.tasks import _canary
from prunekit.evaluate.tasks._canary import Count, Exact, Seed, WordCount


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Copying(Exact):
    """Share of lines of random words that the model copies exactly.

    Args:
        limit: questions.
        words: words in a line, at most 48.
        seed: of the questions.
    """

    limit: Count = 100
    words: WordCount = 8
    seed: Seed = 0

    def load(self) -> list[tuple[str, str]]:
        """Prompts and answers, drawn from the seed."""
        draw = _canary.generator("copying", self.seed)
        return [_question(draw, self.words) for _ in range(self.limit)]


def _question(draw: random.Random, words: int) -> tuple[str, str]:
    lines = [" ".join(draw.sample(_canary.WORDS, words)) for _ in range(3)]
    shown = "".join(f"Line: {line}\nCopy: {line}\n\n" for line in lines[:2])
    return f"{shown}Line: {lines[2]}\nCopy:", lines[2]
