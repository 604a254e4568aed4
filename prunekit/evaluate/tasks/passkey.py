"""A pass key hidden in filler text, asked for at the end."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.evaluate.figures import Figure
from prunekit.evaluate.tasks import _canary
from prunekit.evaluate.tasks._canary import Count, Question, Seed

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.subject import Subject

Length = Annotated[int, Field(ge=96, strict=True)]
_FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
_INTRO = "There is a pass key hidden in a lot of other text. Find it and remember it."
_END = "What is the pass key? The pass key is"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Passkey:
    """Share of five-digit pass keys that the model writes exactly, at several lengths of filler and random depths.

    Args:
        lengths: tokens of the prompts, each at least 96; a prompt has at most as many.
        limit: questions at each length.
        seed: of the keys and depths.
    """

    lengths: Annotated[tuple[Length, ...], Field(min_length=1)] = (256, 1024)
    limit: Count = 10
    seed: Seed = 0

    reads: ClassVar[tuple[str, ...]] = ("text",)
    backends: ClassVar[tuple[str, ...]] = ("torch", "onnx")
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1

    @property
    def figures(self) -> tuple[str, ...]:
        """`acc` over all lengths, and one for each."""
        return ("acc", *(f"acc_{length}" for length in self.lengths))

    def load(self) -> list[tuple[int, str, float]]:
        """Length, key and depth of every question; depth 0 is the front."""
        draw = _canary.generator("passkey", self.seed)
        return [
            (length, str(draw.randint(10000, 99999)), draw.random())
            for length in self.lengths
            for _ in range(self.limit)
        ]

    def prepare(self, data: list[tuple[int, str, float]], subject: Subject) -> Any:
        """As for the other generative tasks; filler is counted in the model's own tokens."""
        questions = [
            Question(_prompt(subject, length, key, depth, number), key)
            for number, (length, key, depth) in enumerate(data)
        ]
        return _canary.prepared(questions, subject)

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Shares over all questions and by length."""
        values = _canary.correct(prepared, subject, progress)
        found = dict(_canary.accuracy(values))
        for number, length in enumerate(self.lengths):
            part = values[number * self.limit : (number + 1) * self.limit]
            found[f"acc_{length}"] = Figure.of("mean", part, better="higher")
        return found


def _prompt(subject: Subject, length: int, key: str, depth: float, number: int) -> str:
    """Introduction, filler with the key somewhere in it, question."""
    told = f"The pass key is {key}. Remember it. {key} is the pass key."
    room = length - len(subject.encode(" ".join((_INTRO, told, _END))))
    filler: list[str] = []
    draw = random.Random(number)
    while True:
        sentence = draw.choice(_FILLER)
        room -= len(subject.encode(" " + sentence, special=False))
        if room < 0:
            break
        filler.append(sentence)
    place = round(depth * len(filler))
    return " ".join((_INTRO, *filler[:place], told, *filler[place:], _END))
