"""Calibration sequences by a data-pruning metric: more are read than asked for, and the best stay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from prunekit.core.errors import UsageError
from prunekit.datasets.encoder import is_causal, pooled, surprises
from prunekit.datasets.examples import Settings, require_finite
from prunekit.datasets.rules import Facts, Rule, choose, decide, ranking
from prunekit.datasets.score import checked, made

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.core.recipe_select import Select


def pool_size(sequences: int, select: Select) -> int:
    """Sequences to read so that `sequences` are the fraction kept: 10 at keep 0.25 are 40."""
    return math.ceil(sequences / select.keep - 1e-9)


def selected(
    pool: Mapping[str, Tensor], sequences: int, select: Select, model: Any, seed: int
) -> tuple[dict[str, Tensor], str]:
    """The sequences of a pool that a metric and a rule keep, in their order, and the reason of the rule.

    Args:
        pool: inputs of the model by name, sequences first.
        sequences: how many stay.
        select: metric and rule.
        model: the model that is going to be pruned, in eval mode.
    Raises:
        UsageError: if the metric needs labels, which calibration text has not.
    """
    data = Sequences(pool, model, Settings(seed=seed))
    scores = checked(select.metric, made(select.metric, {}).score(data), data.n)
    facts = Facts(tokens=int(data.lengths().sum()), params=sum(weight.numel() for weight in model.parameters()))
    which, why = decide(select.rule, sequences, sequences / data.n, facts)
    order = ranking(scores, which == "hard", seed)
    kept = choose(order, Rule(examples=sequences), data.n).tolist()
    return {name: part[kept] for name, part in pool.items()}, f"{which} ones by {select.metric}: {why}"


@dataclass(frozen=True)
class Sequences:
    """Answers metrics as `Examples` does, about inputs that are in memory already; there are no labels.

    Args:
        inputs: by name, sequences first.
        model: in eval mode.
        settings: seed.
    """

    inputs: Mapping[str, Tensor]
    model: Any
    settings: Settings = field(default_factory=Settings)
    n_classes: int = 0
    labelled: bool = False

    @property
    def n(self) -> int:
        """Sequences."""
        return len(next(iter(self.inputs.values())))

    @cached_property
    def vectors(self) -> np.ndarray:
        """Embeddings, float32 [n, d]."""
        import torch

        rows = []
        with torch.no_grad():
            for one in self._each():
                hidden = self.model.base_model(**one).last_hidden_state.float()
                mask = one.get("attention_mask")
                if "pixel_values" not in one and mask is None:
                    mask = torch.ones_like(one["input_ids"])
                rows.append(pooled(hidden, mask).cpu())
        found: np.ndarray = torch.cat(rows).numpy()
        require_finite(found, 0, type(self.model).__name__)
        return found

    @property
    def width(self) -> int:
        """Entries of an embedding."""
        return int(self.vectors.shape[1])

    def embedding_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All embeddings as one block."""
        yield 0, self.vectors

    @property
    def causal(self) -> bool:
        """Whether the model writes text from left to right."""
        return is_causal(self.model)

    def surprises(self) -> np.ndarray:
        """Mean loss in nats, and mean error norm, a token, float32 [n, 2]."""
        if not self.causal:
            raise UsageError("this metric needs a causal language model", hint="select: {metric: ssl_prototypes, ...}")
        return np.concatenate([surprises(self.model, one) for one in self._each()])

    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [n]; 0 for images."""
        if "attention_mask" in self.inputs:
            found: np.ndarray = self.inputs["attention_mask"].sum(1).numpy()
            return found
        ids = self.inputs.get("input_ids")
        return np.full(self.n, 0 if ids is None else ids.shape[1], np.int64)

    def _each(self) -> Iterator[dict[str, Tensor]]:
        device, dtype = self.model.device, self.model.dtype
        for place in range(self.n):
            one = {name: part[place : place + 1].to(device) for name, part in self.inputs.items()}
            yield {name: part.to(dtype) if part.is_floating_point() else part for name, part in one.items()}
