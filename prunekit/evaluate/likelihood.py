"""Log-likelihood of a continuation given its context, in batches padded on the right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunekit.core.errors import EvaluationError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.evaluate.logits import PositionLogits


@dataclass(frozen=True)
class Request:
    """A context and its continuation as token ids, neither empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __len__(self) -> int:
        """Tokens of both together."""
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is.

    Args:
        logprob: sum over its tokens, in nats.
        greedy: whether every token of it is the model's first choice.
    """

    logprob: float
    greedy: bool


def split_request(tokenizer: Any, context: str, continuation: str) -> Request:
    """Tokens of a context and its continuation, split where the context's own tokens end.

    Blanks at the end of the context go to the continuation, where most tokenizers attach them. The tokenizer adds the
    special tokens it adds to any text, at the front; one at the end is taken away. An empty context becomes the
    tokenizer's beginning of text, or its end of text where it has no beginning.

    Args:
        tokenizer: of the model.
        context: text before; may be empty.
        continuation: text that is scored, not empty.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    front = _front(tokenizer)
    if not kept:
        start = front or [_start_of_text(tokenizer)]
        return Request(tuple(start), tuple(_plain(tokenizer, continuation)))
    together, before = _plain(tokenizer, kept + continuation), _plain(tokenizer, kept)
    cut = min(len(before), len(together) - 1)
    return Request(tuple(front + together[:cut]), tuple(together[cut:]))


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _front(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text of its own accord."""
    whole, plain = list(tokenizer("a", verbose=False)["input_ids"]), _plain(tokenizer, "a")
    for first in range(len(whole) - len(plain) + 1):
        if whole[first : first + len(plain)] == plain:
            return whole[:first]
    return []


def _start_of_text(tokenizer: Any) -> int:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise EvaluationError("an empty context cannot be scored", why="the tokenizer has no token that begins a text")
    return int(start)


def likelihoods(
    model: Any,
    requests: Sequence[Request],
    batch_size: int = 8,
    progress: Progress = NULL_PROGRESS,
) -> list[Likelihood]:
    """Log-likelihood of every continuation, in the order given.

    Rows that read the same tokens are run once: choices of one token share their context's pass. Rows of like length
    run together; padding stands on the right, where a causal model does not see it.

    Args:
        model: causal language model, in eval mode.
        requests: at least one.
        batch_size: rows run at once; changes figures by float noise only.
        progress: shown as rows.
    Raises:
        EvaluationError: for a model without a language-model head, or a likelihood that is not a number.
    """
    # The last token predicts nothing that is asked for.
    by_input: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        by_input.setdefault((request.context + request.continuation)[:-1], []).append(number)
    order = sorted(by_input, key=lambda ids: (-len(ids), ids))
    found: dict[int, Likelihood] = {}
    with torch.no_grad(), progress.task("likelihoods", total=len(order), unit="rows") as task:
        logits = PositionLogits(model, torch.tensor(order[0]))
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            found |= _batch(logits, rows, [[(n, requests[n]) for n in by_input[row]] for row in rows])
            task.advance(len(rows))
    return [found[number] for number in range(len(requests))]


def _batch(
    logits: PositionLogits, rows: Sequence[tuple[int, ...]], asked: Sequence[Sequence[tuple[int, Request]]]
) -> dict[int, Likelihood]:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    # Position of the logits -> (request, token that is scored there).
    targets: list[list[tuple[int, int]]] = []
    for number, (row, requests) in enumerate(zip(rows, asked, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
        wanted[number, len(row) - max(len(request.continuation) for _, request in requests) : len(row)] = True
        places: dict[int, list[tuple[int, int]]] = {}
        for which, request in requests:
            start = len(row) - len(request.continuation)
            for offset, token in enumerate(request.continuation):
                places.setdefault(start + offset, []).append((which, token))
        targets += [places.get(place, []) for place in wanted[number].nonzero().flatten().tolist()]
    device = logits.model.device
    padded = None if bool(mask.all()) else mask.to(device)
    sums: dict[int, float] = {}
    greedy: dict[int, bool] = {}
    first = 0
    for piece in logits(ids.to(device), wanted.to(device), padded):
        logs = piece.float().log_softmax(-1)
        best = logs.argmax(-1).tolist()
        scored = [(i, which, token) for i, at in enumerate(targets[first : first + len(piece)]) for which, token in at]
        values = logs[[place for place, _, _ in scored], [token for _, _, token in scored]].tolist()
        for (place, which, token), value in zip(scored, values, strict=True):
            sums[which] = sums.get(which, 0.0) + value
            greedy[which] = greedy.get(which, True) and best[place] == token
        first += len(piece)
    if any(math.isnan(value) for value in sums.values()):
        raise EvaluationError("a log-likelihood is not a number", why="the model's logits hold NaN")
    return {which: Likelihood(value, greedy[which]) for which, value in sums.items()}
