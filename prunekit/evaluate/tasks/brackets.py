"""Closing of brackets in the right order, after three examples."""

from __future__ import annotations

import random

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prunekit.evaluate.tasks import _canary
from prunekit.evaluate.tasks._canary import Count, Exact, Seed


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Brackets(Exact):
    """Share of rows of open brackets that the model closes exactly.

    Args:
        limit: questions.
        depth: brackets in a row.
        seed: of the questions.
    """

    limit: Count = 100
    depth: Count = 4
    seed: Seed = 0

    def load(self) -> list[tuple[str, str]]:
        """Prompts and answers, drawn from the seed."""
        draw = _canary.generator("brackets", self.seed)
        return [_question(draw, self.depth) for _ in range(self.limit)]


_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def _question(draw: random.Random, depth: int) -> tuple[str, str]:
    rows = [[draw.choice("([{<") for _ in range(depth)] for _ in range(4)]
    closed = [" ".join(_PAIRS[sign] for sign in reversed(row)) for row in rows]
    shown = "".join(f"Open: {' '.join(row)}\nClose: {end}\n\n" for row, end in zip(rows[:3], closed[:3], strict=True))
    return f"{shown}Open: {' '.join(rows[3])}\nClose:", closed[3]
