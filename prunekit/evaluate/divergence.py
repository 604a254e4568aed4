"""Where two language models part: KL divergence of their next-token distributions, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.core.errors import EvaluationError, UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.evaluate.figures import Difference, Figure, difference
from prunekit.evaluate.logits import PositionLogits
from prunekit.evaluate.subject import Subject


@dataclass(frozen=True)
class Token:
    """A token on which two models differ much.

    Args:
        text: the token itself, as the text goes on.
        kl: divergence where it is predicted, in nats.
        first: what the first model would have written there.
        other: what the other would have written.
    """

    text: str
    kl: float
    first: str
    other: str


@dataclass(frozen=True)
class Passage:
    """A stretch of text on which two models differ much.

    Args:
        text: as the tokenizer gives it back.
        before: a little text that comes before.
        kl: mean divergence of its tokens, in nats.
        worst: its tokens of the largest divergence.
    """

    text: str
    before: str
    kl: float
    worst: tuple[Token, ...]


@dataclass(frozen=True)
class Divergence:
    """KL(first || other) over a text.

    Args:
        mean: of a token, in nats, with its 95 % interval over windows.
        p50: median over tokens.
        p99: 99th percentile over tokens.
        same_choice: share of tokens where both models' first choice is the same.
        tokens: compared.
        data: the text.
        passages: where the models differ most.
    """

    mean: Difference
    p50: float
    p99: float
    same_choice: float
    tokens: int
    data: str
    passages: tuple[Passage, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def require_same_tokens(first: Subject, other: Subject, text: str) -> None:
    """Refuses models that split the text into different tokens: their distributions are over different things.

    Raises:
        UsageError: naming both.
    """
    what = f"`{first.name}` and `{other.name}` cannot be compared token by token"
    if first.config.get("vocab_size") != other.config.get("vocab_size"):
        sizes = f"{first.config.get('vocab_size')} and {other.config.get('vocab_size')}"
        raise UsageError(what, why=f"their vocabularies have {sizes} entries", hint="give --no-kl")
    if first.encode(text, special=False) != other.encode(text, special=False):
        raise UsageError(what, why="their tokenizers split the text differently", hint="give --no-kl")


def divergence(
    first: Subject,
    other: Subject,
    ids: Tensor,
    data: str,
    passages: int = 3,
    passage_tokens: int = 24,
    progress: Progress = NULL_PROGRESS,
) -> Divergence:
    """KL(first || other) at every token but the first of each window, in float32, and where it is largest.

    Args:
        first: the model that is compared with, usually the dense one.
        other: the other one, of the same vocabulary.
        ids: int64 [windows, tokens].
        data: what the text is called.
        passages: how many stretches of text are shown; they do not overlap.
        passage_tokens: tokens of each.
        progress: shown as windows.
    Raises:
        EvaluationError: for distributions of different size, or a divergence that is no number.
    """
    kl, ours, theirs = [], [], []
    with torch.no_grad(), progress.task("KL", total=ids.shape[0], unit="windows") as task:
        sides = [PositionLogits(subject.model, ids[0]) for subject in (first, other)]
        wanted = torch.arange(ids.shape[1])[None] < ids.shape[1] - 1
        for window in ids:
            a, b = (_logs(side, window[None], wanted) for side in sides)
            if a.shape != b.shape:
                why = f"{a.shape[-1]} and {b.shape[-1]} logits"
                raise EvaluationError("the models' vocabularies differ in size", why=why)
            kl.append((a.exp() * (a - b)).sum(-1).double())
            ours.append(a.argmax(-1))
            theirs.append(b.argmax(-1))
            task.advance(1)
    found = torch.stack(kl)
    if bool(found.isnan().any()):
        raise EvaluationError("the divergence is not a number", why="a model's logits hold NaN")
    means = Figure.of("mean", found.mean(dim=1).tolist(), better="lower")
    nothing = Figure.of("mean", [0.0] * len(found), better="lower")
    same = torch.stack(ours) == torch.stack(theirs)
    ranked = found.flatten().sort().values
    return Divergence(
        mean=difference(nothing, means),
        p50=float(ranked[(len(ranked) - 1) // 2]),
        p99=float(ranked[math.ceil(0.99 * (len(ranked) - 1))]),
        same_choice=float(same.double().mean()),
        tokens=found.numel(),
        data=data,
        passages=_passages(first.tokenizer, ids, found, (ours, theirs), passages, passage_tokens),
    )


def _logs(side: PositionLogits, ids: Tensor, wanted: Tensor) -> Tensor:
    """Log-probabilities float32 [positions, vocabulary] on the CPU."""
    device = side.model.device
    pieces = [piece.float().log_softmax(-1).cpu() for piece in side(ids.to(device), wanted.to(device))]
    return torch.cat(pieces)


def _passages(
    tokenizer: Any, ids: Tensor, kl: Tensor, choices: tuple[Sequence[Tensor], Sequence[Tensor]], n: int, length: int
) -> tuple[Passage, ...]:
    """The stretches of the largest mean divergence; column i of `kl` belongs to token i + 1."""
    length = min(length, kl.shape[1])
    means = kl.unfold(1, length, 1).mean(-1)
    found: list[Passage] = []
    for _ in range(n):
        best = int(means.argmax())
        if not math.isfinite(float(means.flatten()[best])):
            break
        row, start = divmod(best, means.shape[1])
        part = kl[row, start : start + length]
        worst = []
        for place in part.topk(min(3, length)).indices.tolist():
            column = start + place
            texts = (ids[row, column + 1], choices[0][row][column], choices[1][row][column])
            token, ours, theirs = (str(tokenizer.decode([int(one)])) for one in texts)
            worst.append(Token(token, float(part[place]), ours, theirs))
        text = str(tokenizer.decode(ids[row, start + 1 : start + 1 + length].tolist()))
        before = str(tokenizer.decode(ids[row, max(0, start + 1 - length // 2) : start + 1].tolist()))
        found.append(Passage(text, before, float(part.mean()), tuple(worst)))
        means[row, max(0, start - length + 1) : start + length] = -math.inf
    return tuple(found)
