"""Whether few channels carry most of the variance of hidden states."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.types import Panel
from prunekit.evaluate.diagnostics._boundaries import boundaries
from prunekit.evaluate.diagnostics._subject import Subject


class VarianceKurtosis:
    """Kurtosis over channels of each channel's variance over tokens, at every block boundary."""

    source: ClassVar[str] = "When Self-Reference Fails to Close, https://arxiv.org/abs/2604.12128"
    differs: ClassVar[str] = (
        "the paper names the metric; its definition is inferred: E[(v - mean)^4] / E[(v - mean)^2]^2"
    )

    def measure(self, subject: Subject, progress: Progress = NULL_PROGRESS) -> tuple[Panel, ...]:
        """Kurtosis by boundary, at least 1; about as large as the hidden width where one channel has all variance."""
        sums: dict[str, tuple[int, Tensor, Tensor]] = {}
        with progress.task("variance kurtosis", total=subject.sequences, unit="sequences") as task:
            for name, hidden in boundaries(subject, task):
                wide = hidden.double().cpu()
                count, first, second = sums.get(name, (0, torch.zeros(()), torch.zeros(())))
                sums[name] = (count + wide.shape[0], first + wide.sum(0), second + wide.square().sum(0))
        values = []
        for count, first, second in sums.values():
            variance = (second / count - (first / count).square()).clamp_min(0)
            values.append((kurtosis(variance),))
        title = "kurtosis of channel variances after each block"
        return (Panel("variance_kurtosis", title, "", "curve", tuple(sums), ("kurtosis",), tuple(values)),)


def kurtosis(values: Tensor) -> float | None:
    """Fourth central moment over the squared variance of float [n]; None where all are alike. [-1, 1] gives 1."""
    centred = values - values.mean()
    spread = float(centred.square().mean())
    return None if spread == 0 else float((centred**4).mean()) / spread**2
