"""Vectors of texts and images from a frozen model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunekit.core.errors import EvaluationError, UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.evaluate.embedding import pooled_vectors

if TYPE_CHECKING:
    from prunekit.evaluate.subject import Subject


def text_vectors(subject: Subject, texts: Sequence[Sequence[int]], progress: Progress = NULL_PROGRESS) -> Tensor:
    """Mean-pooled last hidden states, float64 [texts, hidden] on the CPU, in the order given.

    Texts of like length run together, padded on the right; equal texts run once.

    Args:
        subject: the model.
        texts: token ids, special tokens included, none empty.
        progress: shown as texts.
    Raises:
        EvaluationError: if a vector holds no numbers.
    """
    model = subject.model
    order = sorted(set(map(tuple, texts)), key=lambda ids: (-len(ids), ids))
    found: dict[tuple[int, ...], Tensor] = {}
    with torch.no_grad(), progress.task("embedding", total=len(order), unit="texts") as task:
        for first in range(0, len(order), subject.batch_size):
            rows = order[first : first + subject.batch_size]
            ids = torch.zeros(len(rows), len(rows[0]), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for number, row in enumerate(rows):
                ids[number, : len(row)] = torch.tensor(row)
                mask[number, : len(row)] = 1
            vectors = pooled_vectors(model, {"input_ids": ids, "attention_mask": mask})
            found |= dict(zip(rows, vectors, strict=True))
            task.advance(len(rows))
    return _finite(torch.stack([found[tuple(ids)] for ids in texts]))


def image_vectors(
    subject: Subject, images: int, pixels: Callable[[int], Tensor], progress: Progress = NULL_PROGRESS
) -> Tensor:
    """Last hidden state of the first position (CLS), float64 [images, hidden] on the CPU.

    Args:
        subject: the model.
        images: how many.
        pixels: gives one by its number, float32 [channels, height, width], as the model expects it; a batch is held at
            a time.
        progress: shown as images.
    Raises:
        EvaluationError: if a vector holds no numbers.
    """
    model, found = subject.model, []
    with torch.no_grad(), progress.task("embedding", total=images, unit="images") as task:
        for first in range(0, images, subject.batch_size):
            numbers = range(first, min(first + subject.batch_size, images))
            batch = torch.stack([pixels(number) for number in numbers]).to(model.device, model.dtype)
            found.append(model.base_model(pixel_values=batch).last_hidden_state[:, 0].double().cpu())
            task.advance(len(batch))
    return _finite(torch.cat(found))


def _finite(vectors: Tensor) -> Tensor:
    if not bool(vectors.isfinite().all()):
        raise EvaluationError("a vector is no number", why="the model's hidden states hold NaN or infinity")
    return vectors


def encoded(subject: Subject, text: str, at: str, length_tokens: int | None) -> list[int]:
    """Token ids of a text with special tokens, cut where a length is given.

    Args:
        subject: the model.
        text: not empty.
        at: where the text stands, for messages.
        length_tokens: longest text in tokens, special tokens included; None cuts nothing.
    Raises:
        UsageError: where an uncut text is longer than the model reads, or the model gives no vectors.
    """
    if subject.backend == "onnx" and subject.kind == "text":
        why = "an exported decoder gives logits only"
        raise UsageError(f"`{subject.name}` gives no vectors", why=why, hint="measure the checkpoint it was made from")
    if length_tokens is None:
        ids = subject.encode(text)
        subject.require_positions(len(ids), "a text", at, "give `length_tokens`, which cuts longer texts")
        return ids
    return list(subject.tokenizer(text, truncation=True, max_length=length_tokens, verbose=False)["input_ids"])
