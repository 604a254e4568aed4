"""Perplexity over windows of text, with logits made a few tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from prunekit.core.errors import EvaluationError
from prunekit.core.progress import NULL_PROGRESS, Progress

# Float32 logits held at a time: a window of 512 tokens over a 49,152-word vocabulary would take 96 MiB. A GPU holds as
# much as an eighth of its free memory.
_LOGIT_BYTES = 64 * 2**20
# Tokens on which the chunked head is compared with the model's own logits.
_PROBE_TOKENS = 8
# Relative to the largest logit: two orders of the same sums differ by 1e-6 in float32 and 1e-2 in bfloat16.
_PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of a text.

    Args:
        perplexity: exp(nll); infinite where that overflows.
        tokens: tokens scored.
        nll: mean negative log-likelihood of a scored token, in nats.
    """

    perplexity: float
    tokens: int
    nll: float


def perplexity(model: Any, ids: Tensor, batch_size: int = 1, progress: Progress = NULL_PROGRESS) -> PerplexityResult:
    """Perplexity of a causal language model; every window starts afresh and its first token is not scored.

    Args:
        model: causal language model, in eval mode.
        ids: int64 [windows, tokens], at least 2 tokens a window, no padding.
        batch_size: windows run at once.
        progress: shown as windows.
    Raises:
        EvaluationError: for windows of the wrong shape, a model without a language-model head, or a likelihood that is
            not a number.
    """
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise EvaluationError(
            "perplexity needs windows of at least 2 tokens", why=f"the ids have shape {list(ids.shape)}"
        )
    if model.get_output_embeddings() is None:
        raise EvaluationError(f"`{type(model).__name__}` has no language-model head", hint="measure embeddings instead")
    ids = ids.to(model.device)
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad(), progress.task("perplexity", total=ids.shape[0], unit="windows") as task:
        logits = _logits(model, ids)
        for window in ids.split(batch_size):
            for part, target in logits(window):
                total += cross_entropy(part.float(), target, reduction="sum").double().cpu()
            task.advance(window.shape[0])
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    nll = float(total) / tokens
    if math.isnan(nll):
        raise EvaluationError("the perplexity is not a number", why="the model's logits hold NaN")
    return PerplexityResult(math.exp(nll) if nll < 700 else math.inf, tokens, nll)


_Chunks = Callable[[Tensor], Iterator[tuple[Tensor, Tensor]]]


def _logits(model: Any, ids: Tensor) -> _Chunks:
    """A generator of (logits [n, vocabulary], next token [n]) for windows [batch, tokens].

    The head runs on a few positions at a time where that gives the model's own logits; models that do more than apply
    their output embeddings (soft caps, scaling) give whole windows.
    """
    head = model.get_output_embeddings()
    base = model.base_model
    held = max(_LOGIT_BYTES, torch.cuda.mem_get_info(ids.device)[0] // 8) if ids.is_cuda else _LOGIT_BYTES

    def chunked(window: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        hidden = base(input_ids=window, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        target = window[:, 1:].flatten()
        rows = max(1, held // (4 * head.weight.shape[0]))
        for first in range(0, hidden.shape[0], rows):
            yield head(hidden[first : first + rows]), target[first : first + rows]

    def whole(window: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield model(input_ids=window, use_cache=False).logits[:, :-1].flatten(0, 1), window[:, 1:].flatten()

    if base is model or not hasattr(head, "weight"):
        return whole
    probe = ids[:1, :_PROBE_TOKENS]
    expected = model(input_ids=probe, use_cache=False).logits.float()
    found = head(base(input_ids=probe, use_cache=False).last_hidden_state).float()
    tolerance = _PROBE_TOLERANCE.get(head.weight.dtype, 2e-2) * float(expected.abs().max())
    same = found.shape == expected.shape and float((found - expected).abs().max()) <= tolerance
    return chunked if same else whole
