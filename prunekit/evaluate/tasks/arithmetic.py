"""Addition and subtraction of two-digit numbers, after four examples."""

from __future__ import annotations

import random

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.evaluate.tasks import _canary
from prunekit.evaluate.tasks._canary import Count, Exact, Seed


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Arithmetic(Exact):
    """Share of sums and differences of two-digit numbers that the model writes exactly; no result is below zero.

    Args:
        limit: questions.
        seed: of the questions.
    """

    limit: Count = 100
    seed: Seed = 0

    def load(self) -> list[tuple[str, str]]:
        """Prompts and answers, drawn from the seed."""
        draw = _canary.generator("arithmetic", self.seed)
        return [_question(draw) for _ in range(self.limit)]


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
