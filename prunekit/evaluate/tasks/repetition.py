"""How much a model repeats itself when it writes freely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import UsageError
from prunekit.evaluate.figures import Figure
from prunekit.evaluate.tasks._canary import Count

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.subject import Subject


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Repetition:
    """Share of n-grams of tokens in greedy continuations that came before in the same continuation.

    The continuation `a b a b a b` has 3 two-grams that came before among 5: 0.6. Dense models repeat themselves too
    under greedy decoding: compare with the dense model's own figure.

    Args:
        data: text whose first lines are continued, as for `perplexity`.
        limit: continuations.
        prompt_tokens: tokens of each line that are given; shorter lines and headings are passed over.
        new_tokens: tokens written after each.
        n: tokens in an n-gram.
    """

    data: Annotated[str, Field(min_length=1, strict=True)] = "wikitext2_eval"
    limit: Count = 20
    prompt_tokens: Count = 16
    new_tokens: Count = 64
    n: Count = 4

    reads: ClassVar[tuple[str, ...]] = ("text",)
    backends: ClassVar[tuple[str, ...]] = ("torch", "onnx")
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("repeated",)

    def load(self) -> str:
        """The text."""
        from prunekit.calibrate.texts import load_text

        if self.new_tokens < self.n:
            what = f"`new_tokens: {self.new_tokens}` holds no n-gram"
            raise UsageError(what, why=f"an n-gram has {self.n} tokens")
        return load_text(self.data)

    def prepare(self, data: str, subject: Subject) -> list[list[int]]:
        """Prompts as tokens."""
        subject.require_positions(self.prompt_tokens + self.new_tokens, "a continuation", hint="lower `new_tokens`")
        prompts: list[list[int]] = []
        for line in data.split("\n"):
            if len(prompts) == self.limit:
                break
            if line.strip() and not line.strip().startswith("="):
                ids = subject.encode(line.strip())
                if len(ids) > self.prompt_tokens:
                    prompts.append(ids[: self.prompt_tokens])
        if not prompts:
            raise UsageError(f"`{self.data}` has no line of more than {self.prompt_tokens} tokens")
        return prompts

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Mean share over continuations; one too short for an n-gram repeats nothing."""
        from prunekit.evaluate.generation import continuations

        written = continuations(subject.model, prepared, self.new_tokens, subject.batch_size, progress)
        return {"repeated": Figure.of("mean", [repeated(ids, self.n) for ids in written], better="lower")}


def repeated(ids: Sequence[int], n: int) -> float:
    """Share of n-grams that came before: 1 less distinct over all; 0 without any."""
    grams = [tuple(ids[place : place + n]) for place in range(len(ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
