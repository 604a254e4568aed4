"""What a training is given: the cut model, the dense one, and how their blocks belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prunekit.checkpoint.cache import cache_folder
from prunekit.checkpoint.digest import model_digest
from prunekit.core.errors import HealError, UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.core.recipe_heal import Training
    from prunekit.plan.layout import Pair

Talk = Callable[[str], None]
# Of the rows of a text, inputs by name in the order in which they were drawn, so many stay.
Choose = Callable[[Mapping[str, "Tensor"], int], Mapping[str, "Tensor"]]
# Tokens that the teacher reads at once where nothing is trained.
TOKENS_AT_ONCE = 4096


def _silent(text: str) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Scene:
    """One healing.

    Args:
        asked: the recipe's `heal` or `learn`.
        student: folder of the cut model.
        teacher: folder of the dense model; None where there is none.
        load_teacher: gives the dense model in eval mode, on the device that is trained on.
        tokenizer: of both.
        decoder: whether the model writes text; else it is a text encoder.
        device: `cpu`, `cuda` or `mps`.
        matches: dense block whose output each block of the cut model should give; None where nobody knows.
        trust_remote_code: whether code in the student's folder may run.
        choose: keeps the rows that `heal.select` asks for; None where it asks for nothing.
        made_from: what the cut model was made from, where that can be told from its plan; else its files tell it apart
            from others. A repair on a GPU need not give the same bits twice.
        cache: folder for what the teacher says; the usual one by default.
        progress: bars.
        talk: told in a line what happens now.
    """

    asked: Training
    student: Path
    teacher: Path | None
    load_teacher: Callable[[], Any]
    tokenizer: Any
    decoder: bool
    device: str
    matches: tuple[int, ...] | None = None
    trust_remote_code: bool = False
    choose: Choose | None = None
    made_from: str | None = None
    cache: Path | None = None
    progress: Progress = NULL_PROGRESS
    talk: Talk = _silent

    @cached_property
    def student_digest(self) -> str:
        """Of what the cut model was made from, or of its files."""
        if self.made_from is not None:
            return hashlib.sha256(self.made_from.encode()).hexdigest()
        return model_digest(self.student)

    @cached_property
    def teacher_digest(self) -> str:
        """Of everything in the teacher's folder that can change a number.

        Raises:
            UsageError: without a teacher.
        """
        if self.teacher is None:
            raise UsageError("healing needs the dense model here", hint="give --teacher MODEL")
        return model_digest(self.teacher)

    @property
    def no_cache(self) -> dict[str, bool]:
        """What keeps a model from filling a KV cache; encoders have none."""
        return {"use_cache": False} if self.decoder else {}

    def cached(self, kind: str, key: str) -> Path:
        """Where something that the teacher said lies, by its digest."""
        return cache_folder(self.cache) / "heal" / f"{kind}-{key[:24]}"


class Objective(Protocol):
    """What is made small. `hidden_states`: whether the model must give them; `teacher`: a model run at every step.

    `of_tokens`: whether the loss is a mean over tokens, padding left out, instead of one over sequences.
    Called with the student's outputs, its inputs by name, and the numbers of the rows in the data, int64 [B].
    """

    hidden_states: bool
    teacher: Any
    of_tokens: bool

    def __call__(self, outputs: Any, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """The loss, a scalar."""


def matches(pairs: Sequence[Pair], dense_blocks: int) -> tuple[int, ...]:
    """For each block of a cut model the dense block whose output it should give.

    That is the last one before the next block that stayed, so that what was removed between them is made up for.
    Pairs (0, 0) (1, 1) (5, 5) of 8 blocks give 0, 4, 7.

    Args:
        pairs: source blocks of attention and FFN for each block, as in a layout.
        dense_blocks: how many the dense model has.
    """
    first = [min((i for i in pair if i is not None), default=number) for number, pair in enumerate(pairs)]
    return (*(later - 1 for later in first[1:]), dense_blocks - 1)


def require_same_vocabulary(student: Mapping[str, Any], teacher: Mapping[str, Any], ours: Any, theirs: Any) -> None:
    """Fails where tokens mean different things to the two models.

    Args:
        student: configuration of the cut model.
        teacher: of the dense one.
        ours: tokenizer of the cut model, None where it has none.
        theirs: of the dense one.
    Raises:
        HealError: if sizes or tokens differ.
    """
    sizes = [config.get("vocab_size") for config in (student, teacher)]
    why = f"it has {sizes[1]} tokens, the cut model {sizes[0]}" if sizes[0] != sizes[1] else ""
    if not why and ours is not None and theirs is not None:
        a, b = ours.get_vocab(), theirs.get_vocab()
        odd = next((token for token in sorted(a.keys() | b.keys()) if a.get(token) != b.get(token)), None)
        why = "" if odd is None else f"`{odd}` is {b.get(odd)} there and {a.get(odd)} here"
    if why:
        raise HealError(
            "the teacher has another vocabulary than the cut model",
            why=why,
            hint="give the model that was cut as the teacher",
        )
