"""Attention relations: how alike the tokens of a text are as queries, as keys and as values.

B: sequences, H: heads, T: tokens, D: head width, R: relation heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prunekit.heal._attention import attending

# Queries, keys and values [B, H, T, D], keys and values of as many heads as there are.
States = tuple[Tensor, Tensor, Tensor]


class Ear:
    """Dense attention that remembers what entered the last one of a pass."""

    def __init__(self) -> None:
        self._states: States | None = None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """As transformers calls an attention function."""
        self._states = (query, key, value)
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found

    def take(self) -> States:
        """What entered the last attention, once."""
        if self._states is None:
            raise ValueError("no attention was passed since this was asked last")
        found, self._states = self._states, None
        return found


@contextmanager
def listening(model: Any, teacher: Any, ours: Ear, theirs: Ear) -> Iterator[None]:
    """Meanwhile an ear is in each of two models.

    Raises:
        HealError: if the attention of one cannot be changed.
    """
    with attending(model, ours), attending(teacher, theirs, "prunekit_teacher"):
        yield


def relation_error(ours: States, theirs: States, mask: Tensor | None) -> Tensor:
    """Mean over queries, keys and values, relation heads and tokens of KL(teacher || student) between relations.

    A relation is softmax(A A^T / sqrt(width)), where A holds all heads of a token, split into as many relation heads as
    divide the heads of both models, so that the two may differ in heads. A token of a causal model is compared with
    those before it.

    Args:
        ours: of the student.
        theirs: of the teacher.
        mask: 1 where a token counts [B, T]; None for a causal model without padding.
    Source:
        MiniLMv2, https://arxiv.org/abs/2012.15828, section 3.1.
    """
    tokens = ours[0].shape[2]
    if mask is None:
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=ours[0].device).tril()
    else:
        seen = mask[:, None, None, :].bool()
    terms = []
    for a, b in zip(ours, theirs, strict=True):
        heads = math.gcd(a.shape[1], b.shape[1])
        student, teacher = _log_relation(a, heads, seen), _log_relation(b, heads, seen)
        terms.append((teacher.exp() * (teacher - student)).sum(-1).mean(1))
    error = torch.stack(terms).mean(0)
    return error.mean() if mask is None else (error * mask).sum() / mask.sum()


def _log_relation(states: Tensor, heads: int, seen: Tensor) -> Tensor:
    """Logarithm of a relation [B, R, T, T], hardly anything where a token is not seen."""
    joined = states.float().transpose(1, 2).flatten(2)
    split = joined.unflatten(2, (heads, -1)).transpose(1, 2)
    products = split @ split.transpose(-1, -2) / math.sqrt(split.shape[-1])
    return products.masked_fill(~seen, torch.finfo(torch.float32).min).log_softmax(-1)
