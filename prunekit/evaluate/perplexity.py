"""Perplexity over windows of text, afresh or sliding, with logits made a few tokens at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from prunekit.core.errors import EvaluationError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.evaluate.logits import PositionLogits


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of a text.

    Args:
        perplexity: exp(nll); infinite where that overflows.
        tokens: tokens scored.
        nll: mean negative log-likelihood of a scored token, in nats.
        window_nll: the sum of each window, in nats.
        window_tokens: tokens scored in each window.
    """

    perplexity: float
    tokens: int
    nll: float
    window_nll: tuple[float, ...] = ()
    window_tokens: tuple[int, ...] = ()


def sliding_windows(ids: Tensor, length_tokens: int, stride_tokens: int) -> tuple[Tensor, Tensor]:
    """Windows that overlap, so that scored tokens have context before them.

    Every window but the first scores only what the one before it did not reach: `stride_tokens` tokens, each with at
    least `length_tokens - stride_tokens` before it. The last window ends with the text and may score fewer.

    Args:
        ids: int64 [tokens], at least 2.
        length_tokens: tokens in a window; a shorter text is one window.
        stride_tokens: by how much a window lies behind the one before, at least 1 and below `length_tokens`.
    Returns:
        Windows int64 [n, length], and how many tokens at the end of each are scored int64 [n]. 10 tokens at length 4
        and stride 3 give the starts 0, 3, 6 and the counts 3, 3, 3: all but the first token.
    """
    total, length = ids.numel(), min(length_tokens, ids.numel())
    starts, scored, reached = [0], [length - 1], length
    while reached < total:
        end = min(starts[-1] + stride_tokens + length, total)
        starts.append(end - length)
        scored.append(end - reached)
        reached = end
    return torch.stack([ids[start : start + length] for start in starts]), torch.tensor(scored)


def perplexity(
    model: Any, ids: Tensor, batch_size: int = 1, progress: Progress = NULL_PROGRESS, scored: Tensor | None = None
) -> PerplexityResult:
    """Perplexity of a causal language model; every window starts afresh and its first token is not scored.

    Args:
        model: causal language model, in eval mode.
        ids: int64 [windows, tokens], at least 2 tokens a window, no padding.
        batch_size: windows run at once.
        progress: shown as windows.
        scored: int64 [windows], how many tokens at the end of each window count; None counts all but the first.
    Raises:
        EvaluationError: for windows of the wrong shape, a model without a language-model head, or a likelihood that is
            not a number.
    """
    require_windows(ids)
    windows, length = ids.shape
    counts = torch.full((windows,), length - 1) if scored is None else scored
    sums: list[float] = []
    with torch.no_grad(), progress.task("perplexity", total=windows, unit="windows") as task:
        logits = PositionLogits(model, ids[0])
        for part, count in zip(ids.split(batch_size), counts.split(batch_size), strict=True):
            window = part.to(model.device)
            # Position i predicts token i + 1.
            wanted = (torch.arange(length) >= length - 1 - count[:, None]) & (torch.arange(length) < length - 1)
            wanted = wanted.to(model.device)
            target = window.roll(-1, dims=1)[wanted]
            losses, first = [], 0
            for piece in logits(window, wanted):
                losses.append(
                    cross_entropy(piece.float(), target[first : first + len(piece)], reduction="none").double()
                )
                first += len(piece)
            sums += [float(row.sum()) for row in torch.cat(losses).cpu().split(count.tolist())]
            task.advance(len(part))
    return summed(sums, counts.tolist())


def require_windows(ids: Tensor) -> None:
    """Refuses windows that hold nothing to score.

    Raises:
        EvaluationError: unless ids are [windows, at least 2 tokens].
    """
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise EvaluationError(
            "perplexity needs windows of at least 2 tokens", why=f"the ids have shape {list(ids.shape)}"
        )


def summed(sums: list[float], counts: list[int]) -> PerplexityResult:
    """Perplexity from each window's negative log-likelihood and scored tokens.

    Raises:
        EvaluationError: if a likelihood is not a number.
    """
    tokens = sum(counts)
    nll = sum(sums) / tokens
    if math.isnan(nll):
        raise EvaluationError("the perplexity is not a number", why="the model's logits hold NaN")
    return PerplexityResult(exp(nll), tokens, nll, tuple(sums), tuple(counts))


def exp(nll: float) -> float:
    """The exponential, infinite where a float cannot hold it."""
    return math.exp(nll) if nll < 700 else math.inf
