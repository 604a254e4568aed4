"""How long hidden states are at every block boundary."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.types import Panel
from prunekit.evaluate.diagnostics._boundaries import boundaries
from prunekit.evaluate.diagnostics._subject import Subject


class ActivationNorms:
    """Euclidean length of the residual stream at every block boundary: mean and largest over tokens."""

    source: ClassVar[str] = "Massive Activations in Large Language Models, https://arxiv.org/abs/2402.17762"
    differs: ClassVar[str] = "lengths of whole hidden states instead of single channels"

    def measure(self, subject: Subject, progress: Progress = NULL_PROGRESS) -> tuple[Panel, ...]:
        """Mean and largest length by boundary: `input`, then the output of every block."""
        lengths: dict[str, list[Tensor]] = {}
        with progress.task("activation norms", total=subject.sequences, unit="sequences") as task:
            for name, hidden in boundaries(subject, task):
                lengths.setdefault(name, []).append(hidden.norm(dim=-1).double().cpu())
        values = []
        for parts in lengths.values():
            total, count = sum(float(part.sum()) for part in parts), sum(part.numel() for part in parts)
            values.append((total / count, max(float(part.max()) for part in parts)))
        title = "length of hidden states after each block"
        return (Panel("activation_norms", title, "", "curve", tuple(lengths), ("mean", "largest"), tuple(values)),)
