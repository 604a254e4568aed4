"""Patterns that look at queries and keys before they choose blocks.

A scored pattern says which blocks a prompt reads, by head, and which pages a step reads; masks inside blocks are plain
causality. What it scores with, it computes from the keys alone and can keep from step to step.

Shapes: H query heads, G key-value heads, S queries, T keys, D head size, B batch, P pages.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor
from typing_extensions import TypeIs

from prunekit_kernels.block_sparse_prefill import BlockLists

BLOCK = 128


class Scored(Protocol):
    """A pattern that chooses by score; always causal."""

    paper: ClassVar[tuple[str, str]]

    @property
    def causal(self) -> bool:
        """Whether keys after the query are hidden."""
        ...

    @property
    def pages(self) -> tuple[int, int]:
        """Tokens of a page and pages that a step keeps; (0, 0) if steps read everything."""
        ...

    def __hash__(self) -> int: ...

    def prompt_lists(self, q: Tensor, k: Tensor, scale: float) -> BlockLists | None:
        """Blocks of 128 that each head reads, for q [1, H, S, D] and k [1, G, T, D]; None if prompts are dense."""
        ...

    def summaries(self, k: Tensor) -> tuple[Tensor, ...]:
        """What page scores are computed from, tensors [B, G, P, D]."""
        ...

    def page_scores(self, q: Tensor, summaries: tuple[Tensor, ...]) -> Tensor:
        """Float32 [B, G, P], higher = keep, for queries [B, H, 1, D]."""
        ...


def is_scored(pattern: object) -> TypeIs[Scored]:
    """Whether a pattern chooses by score instead of by position."""
    return hasattr(pattern, "prompt_lists")


def reads_every_page(pattern: Scored, n_keys: int) -> bool:
    """Whether a step of the pattern over so many keys leaves none out."""
    size, keep = pattern.pages
    return not 0 < size * keep < n_keys


class DenseSteps:
    """The part of a scored pattern that speaks of steps, where they read everything."""

    @property
    def pages(self) -> tuple[int, int]:
        """Steps read everything."""
        return 0, 0

    def summaries(self, k: Tensor) -> tuple[Tensor, ...]:
        """Nothing."""
        return ()

    def page_scores(self, q: Tensor, summaries: tuple[Tensor, ...]) -> Tensor:
        """Of no page, [B, 0, 0]."""
        return torch.zeros(q.shape[0], 0, 0, device=q.device)
