"""Models side by side: the same tasks, paired intervals of their differences, and where they part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunekit.evaluate.divergence import Divergence
from prunekit.evaluate.figures import RESAMPLES, Difference, Figure, difference
from prunekit.evaluate.run import Evaluation


@dataclass(frozen=True)
class Compared:
    """One figure of two models on the same examples.

    Args:
        label: of the task.
        name: of the figure.
        first: the figure of the model that is compared with.
        other: that of the other model.
        difference: other less first.
    """

    label: str
    name: str
    first: Figure
    other: Figure
    difference: Difference

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "label": self.label,
            "figure": self.name,
            "n": len(self.first.examples[0]) if self.first.examples else None,
            "first": self.first.value,
            "other": self.other.value,
            "difference": self.difference.value,
            "low": self.difference.low,
            "high": self.difference.high,
            "clear": self.difference.clear,
            "better": self.first.better,
            "unit": self.first.unit,
        }


@dataclass(frozen=True)
class Comparison:
    """Models compared with the first.

    Args:
        evaluations: of all models, the first first.
        divergences: KL of the first to every other; None where it was not measured.
        seed: of the resamples.
    """

    evaluations: tuple[Evaluation, ...]
    divergences: tuple[Divergence | None, ...]
    seed: int = 0

    def to_json(self, examples: bool = False) -> dict[str, Any]:
        """Plain values.

        Args:
            examples: whether per-example values are in.
        """
        first, *others = self.evaluations
        return {
            "models": [evaluation.to_json(examples) for evaluation in self.evaluations],
            "comparisons": [
                {
                    "model": other.subject.name,
                    "differences": [entry.to_json() for entry in compared(first, other, self.seed)],
                    "kl": None if kl is None else kl.to_json(),
                }
                for other, kl in zip(others, self.divergences, strict=True)
            ],
            "method": method(self.seed),
        }


def method(seed: int = 0) -> str:
    """How intervals are made, in a sentence."""
    return (
        f"95 % intervals: paired percentile bootstrap over examples, {RESAMPLES:,} resamples, seed {seed}; "
        "examples of a perplexity and of KL are windows."
    )


def compared(first: Evaluation, other: Evaluation, seed: int = 0) -> list[Compared]:
    """Every figure that both models have, in order."""
    theirs = {entry.asked.label: entry.figures for entry in other.measured}
    found = []
    for entry in first.measured:
        for name, figure in entry.figures.items():
            match = theirs.get(entry.asked.label, {}).get(name)
            if match is not None:
                found.append(Compared(entry.asked.label, name, figure, match, _difference(figure, match, seed)))
    return found


def _difference(first: Figure, other: Figure, seed: int) -> Difference:
    if not (math.isfinite(first.value) and math.isfinite(other.value)):
        return Difference(other.value - first.value)
    return difference(first, other, seed=seed)


def names(sources: Sequence[str], found: Sequence[str]) -> list[str]:
    """Names that tell models apart: the short ones, or where two are equal what was typed, or that with a number."""
    chosen = [name if list(found).count(name) == 1 else source for name, source in zip(found, sources, strict=True)]
    return [name if chosen.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(chosen, start=1)]
