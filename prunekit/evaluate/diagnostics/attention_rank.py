"""How many directions each head's attention map uses."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.types import Panel
from prunekit.evaluate.diagnostics._subject import HeadMeans, Subject


class AttentionRank:
    """Effective rank of a head's attention map, averaged over sequences."""

    source: ClassVar[str] = (
        "Roy and Vetterli, The effective rank, EUSIPCO 2007; as a metric of attention in "
        "When Self-Reference Fails to Close, https://arxiv.org/abs/2604.12128"
    )
    differs: ClassVar[str] = "the paper names the metric; the matrix (queries x keys of one head) is inferred"

    def measure(self, subject: Subject, progress: Progress = NULL_PROGRESS) -> tuple[Panel, ...]:
        """Effective rank of each head, from 1 (every query attends alike) to the number of tokens."""
        means = HeadMeans()
        total = subject.sequences * len(subject.attention_addresses)
        with progress.task("attention rank", total=total, unit="maps") as task:
            for visit in subject.visits():
                if visit.attention is not None:
                    means.add(visit.address, effective_rank(visit.attention))
                    task.advance()
        return (means.panel("attention_rank", "effective rank of the attention map"),)


def effective_rank(matrices: Tensor) -> Tensor:
    """Effective rank of matrices float [..., rows, columns]: exp of the entropy of their singular values' shares.

    The identity of size n gives n, a matrix of rank one gives 1, zeros give 1.
    """
    values = torch.linalg.svdvals(matrices.double())
    shares = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(shares).sum(-1).exp()
