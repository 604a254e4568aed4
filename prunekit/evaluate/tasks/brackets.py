"""Closing of brackets in the right order, after three examples."""

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
class Brackets:
    """Share of rows of open brackets that the model closes exactly.

    Args:
        limit: questions.
        depth: brackets in a row.
        seed: of the questions.
    """

    limit: Count = 100
    depth: Count = 4
    seed: Seed = 0

    reads: ClassVar[tuple[str, ...]] = ("text",)
    backends: ClassVar[tuple[str, ...]] = ("torch",)
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("acc",)

    def load(self) -> list[tuple[str, str]]:
        """Prompts and answers, drawn from the seed."""
        draw = _canary.generator("brackets", self.seed)
        return [_question(draw, self.depth) for _ in range(self.limit)]

    def prepare(self, data: list[tuple[str, str]], subject: Subject) -> Any:
        """Prompts as tokens, answers, and how many tokens are written."""
        return _canary.prepared([Question(*entry) for entry in data], subject)

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Share of questions answered exactly."""
        return _canary.accuracy(_canary.correct(prepared, subject, progress))


_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def _question(draw: random.Random, depth: int) -> tuple[str, str]:
    rows = [[draw.choice("([{<") for _ in range(depth)] for _ in range(4)]
    closed = [" ".join(_PAIRS[sign] for sign in reversed(row)) for row in rows]
    shown = "".join(f"Open: {' '.join(row)}\nClose: {end}\n\n" for row, end in zip(rows[:3], closed[:3], strict=True))
    return f"{shown}Open: {' '.join(rows[3])}\nClose:", closed[3]
