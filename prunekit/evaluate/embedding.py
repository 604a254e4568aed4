"""How alike two encoders embed the same sentences, and two models of any kind answer the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from prunekit.core.errors import EvaluationError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.modeling.pooling import masked_mean

# Ends of the model types, stock and heterogeneous, whose positions are patches only.
_WITHOUT_CLS = ("siglip_vision_model", "videomae")


@dataclass(frozen=True)
class EmbeddingResult:
    """Likeness of two models on the same inputs.

    Args:
        mean: mean cosine between the two models' vectors.
        min: smallest cosine.
        max_abs_diff: largest absolute difference between two entries.
        sequences: vectors compared.
    """

    mean: float
    min: float
    max_abs_diff: float
    sequences: int


def embedding_cosine(
    model_a: Any,
    model_b: Any,
    batch: Mapping[str, Tensor],
    batch_size: int = 16,
    progress: Progress = NULL_PROGRESS,
) -> EmbeddingResult:
    """Compares mean-pooled last hidden states; padding does not count.

    Args:
        model_a: encoder, in eval mode.
        model_b: another one with the same hidden size; may be on another device.
        batch: inputs of both by name [sequences, ...]; without `attention_mask` every position counts.
        batch_size: sequences run at once.
        progress: shown as sequences.
    Raises:
        EvaluationError: where the models' vectors have different sizes or hold NaN.
    """
    return _compare(model_a, model_b, batch, batch_size, progress, pooled=True)


def feature_cosine(
    model_a: Any,
    model_b: Any,
    batch: Mapping[str, Tensor],
    batch_size: int = 16,
    progress: Progress = NULL_PROGRESS,
) -> EmbeddingResult:
    """Compares the logits of two models, or the last hidden state of the first position (CLS) where there are none.

    Meant for vision models, those without a CLS by the mean over positions; arguments as `embedding_cosine`.
    """
    return _compare(model_a, model_b, batch, batch_size, progress, pooled=False)


def _compare(
    model_a: Any, model_b: Any, batch: Mapping[str, Tensor], batch_size: int, progress: Progress, pooled: bool
) -> EmbeddingResult:
    sequences = next(iter(batch.values())).shape[0]
    cosines, largest = [], 0.0
    vectors = pooled_vectors if pooled else _answer
    with torch.no_grad(), progress.task("comparing", total=sequences, unit="sequences") as task:
        for first in range(0, sequences, batch_size):
            part = {name: value[first : first + batch_size] for name, value in batch.items()}
            a, b = vectors(model_a, part), vectors(model_b, part)
            if a.shape != b.shape:
                raise EvaluationError("the models' vectors differ in size", why=f"{a.shape[-1]} against {b.shape[-1]}")
            cosines.append(cosine_similarity(a, b, dim=-1))
            largest = max(largest, float((a - b).abs().max()))
            task.advance(a.shape[0])
    found = torch.cat(cosines)
    if bool(found.isnan().any()):
        raise EvaluationError("the cosine is not a number", why="a model's output holds NaN")
    return EmbeddingResult(float(found.mean()), float(found.min()), largest, sequences)


def pooled_vectors(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean of the last hidden state over positions that are not padding, float64 [sequences, hidden] on the CPU.

    Args:
        model: any with a base model, in eval mode.
        batch: its inputs by name [sequences, ...]; without `attention_mask` every position counts.
    """
    hidden = model.base_model(**_on(model, batch)).last_hidden_state.double().cpu()
    mask = batch.get("attention_mask")
    return hidden.mean(dim=1) if mask is None else masked_mean(hidden, mask.cpu())


def _answer(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    output = model(**_on(model, batch))
    logits = getattr(output, "logits", None)
    if logits is None:
        hidden = output.last_hidden_state
        logits = hidden.mean(dim=1) if model.config.model_type.endswith(_WITHOUT_CLS) else hidden[:, 0]
    found: Tensor = logits
    return found.double().cpu().flatten(1)


def _on(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in batch.items()
    }
