"""How evenly each head spreads its attention."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.types import Panel
from prunekit.evaluate.diagnostics._subject import HeadMeans, Subject


class AttentionEntropy:
    """Shannon entropy of a head's attention over keys, averaged over queries and sequences, in nats."""

    source: ClassVar[str] = "Scan and Snap, https://arxiv.org/abs/2305.16380: low entropy marks heads that settled"
    differs: ClassVar[str] = "the paper has a theory of one layer; the mean over queries of a trained model is ours"

    def measure(self, subject: Subject, progress: Progress = NULL_PROGRESS) -> tuple[Panel, ...]:
        """Entropy of each head, from 0 (one key) to log of the number of keys (all alike)."""
        means = HeadMeans()
        total = subject.sequences * len(subject.attention_addresses)
        with progress.task("attention entropy", total=total, unit="maps") as task:
            for visit in subject.visits():
                if visit.attention is not None:
                    means.add(visit.address, entropy(visit.attention).mean(-1))
                    task.advance()
        return (means.panel("attention_entropy", "attention entropy, mean over queries", "nats"),)


def entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of distributions float [..., n] over their last dimension; [0.5, 0.5, 0, 0] gives log 2."""
    return torch.special.entr(weights).sum(-1)
