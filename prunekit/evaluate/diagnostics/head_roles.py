"""What each head does: rests on the first token, looks nearby, or fetches what came before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.types import Panel
from prunekit.evaluate.diagnostics._subject import HeadMeans, Subject

# Beyond this, random tokens that repeat tell nothing more about a head, and the map grows with the square.
_MOST_REPEATED = 128


@dataclass(frozen=True)
class HeadRoles:
    """Share of a head's attention on the first token (sink) and nearby (local), and how often it copies (retrieval).

    Args:
        window_tokens: how near is local: the query's own token and those within this distance.
        repeats: sequences of random tokens, each followed by itself, for retrieval.
    """

    window_tokens: int = 16
    repeats: int = 2

    source: ClassVar[str] = (
        "sink: When Attention Sink Emerges, https://arxiv.org/abs/2410.10781 (threshold 0.3); local: Analyzing "
        "Multi-Head Self-Attention, https://arxiv.org/abs/1905.09418 (positional heads); retrieval: Retrieval Head "
        "Mechanistically Explains Long-Context Factuality, https://arxiv.org/abs/2404.15574 (threshold 0.1)"
    )
    differs: ClassVar[str] = (
        "sink leaves the first query out, which has no choice; local counts attention within a window instead of the "
        "share of queries whose largest weight is on a neighbour, threshold 0.5; retrieval reads random tokens that "
        "repeat, given instead of generated, instead of a needle in a text"
    )

    def measure(self, subject: Subject, progress: Progress = NULL_PROGRESS) -> tuple[Panel, ...]:
        """Each in [0, 1] by head; local only for text, retrieval only for decoders of text."""
        sink, local = HeadMeans(), HeadMeans()
        with progress.task("sink and local heads", total=subject.sequences, unit="sequences") as task:
            for visit in subject.visits():
                if visit.attention is not None:
                    sink.add(visit.address, sink_share(visit.attention))
                    local.add(visit.address, local_share(visit.attention, self.window_tokens))
                if visit.address == subject.stack.addresses[-1]:
                    task.advance()
        panels = [sink.panel("sink", "attention on the first token", threshold=0.3)]
        if "input_ids" in subject.inputs:
            title = f"attention within {self.window_tokens} tokens"
            panels.append(local.panel("local", title, threshold=0.5))
            if subject.decoder:
                panels.append(self._retrieval(subject, progress))
        return tuple(panels)

    def _retrieval(self, subject: Subject, progress: Progress) -> Panel:
        ids = repeated(subject, self.repeats)
        means = HeadMeans()
        with progress.task("retrieval heads", total=self.repeats, unit="sequences") as task:
            for place, visit in enumerate(subject.visits({"input_ids": ids})):
                row, last = divmod(place, len(subject.stack.addresses))
                if visit.attention is not None:
                    means.add(visit.address, copy_rate(visit.attention, ids[row]))
                if last + 1 == len(subject.stack.addresses):
                    task.advance()
        return means.panel("retrieval", "copies the next token of a repeated text", threshold=0.1)


def sink_share(attention: Tensor) -> Tensor:
    """Mean weight on the first key of all queries but the first, of float [heads, queries, keys]: [heads]."""
    rows = attention[:, 1:] if attention.shape[1] > 1 else attention
    return rows[:, :, 0].mean(-1)


def local_share(attention: Tensor, window_tokens: int) -> Tensor:
    """Mean weight on keys at most `window_tokens` away, of float [heads, queries, keys]: [heads].

    Only queries with keys farther away than that count; where there are none, all do.
    """
    queries, keys = attention.shape[1:]
    apart = (torch.arange(queries)[:, None] - torch.arange(keys)[None]).abs().to(attention.device)
    near = attention.masked_fill(apart > window_tokens, 0.0).sum(-1)
    chosen = torch.arange(queries, device=attention.device) > window_tokens
    return near[:, chosen].mean(-1) if bool(chosen.any()) else near.mean(-1)


def repeated(subject: Subject, sequences: int) -> Tensor:
    """Random tokens followed by the same tokens, int64 [sequences, tokens]; half as long as the subject's text each."""
    text: Mapping[str, Tensor] = subject.inputs
    half = max(2, min(_MOST_REPEATED, text["input_ids"].shape[1]) // 2)
    words = subject.stack.model.get_input_embeddings().weight.shape[0]
    # Tokens of the text itself, so that none is one that the tokenizer never gives.
    known = text["input_ids"].unique()
    pool = known if known.numel() >= half else torch.arange(words)
    draw = torch.Generator().manual_seed(subject.seed)
    rows = [pool.cpu()[torch.randperm(pool.numel(), generator=draw)[:half]] for _ in range(sequences)]
    once = torch.stack(rows)
    return torch.cat([once, once], dim=1)


def copy_rate(attention: Tensor, ids: Tensor) -> Tensor:
    """Share of queries in the second half whose largest weight is on the token that comes next, [heads].

    Args:
        attention: float [heads, tokens, tokens].
        ids: int64 [tokens], the second half equal to the first.
    """
    half = ids.numel() // 2
    ids = ids.to(attention.device)
    top = attention[:, half:-1].argmax(-1)
    hit = (ids[top] == ids[half + 1 :]) & (top < half)
    return hit.double().mean(-1)
