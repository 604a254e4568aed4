"""Small models that judge what a data-pruning metric kept; many train at once, one product of matrices a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("train", "dev")
# Numbers that words and pairs of words are hashed to.
WORDS = 1 << 13


@dataclass(frozen=True)
class Judge:
    """A kind of model: shapes of its weights, and logits [M, B, classes] of M of them from weights and inputs."""

    shapes: tuple[tuple[int, ...], ...]
    logits: Callable[[list[Tensor], Tensor], Tensor]
    steps: int
    batch: int
    lr: float
    decay: float


def judge_of(name: str, kind: str, d: int, classes: int) -> Judge:
    """A head on embeddings of `d` entries, or from scratch: a bag of words, or three convolutions on 32 x 32 pixels."""
    if name == "head":
        return Judge(((d, 64), (1, 64), (64, classes), (1, classes)), head_logits, 200, 128, 3e-3, 0.1)
    if kind == "text":
        return Judge(((WORDS, 16), (16, classes), (1, classes)), words_logits, 200, 128, 1e-2, 0.1)
    layers = ((27, 32), (1, 32), (288, 64), (1, 64), (576, 128), (1, 128), (128, classes), (1, classes))
    return Judge(layers, image_logits, 400, 64, 2e-3, 0.1)


def head_logits(weights: list[Tensor], x: Tensor) -> Tensor:
    a, b, c, d = weights
    return (x @ a + b).relu() @ c + d


def words_logits(weights: list[Tensor], x: Tensor) -> Tensor:
    import torch

    table, a, b = weights
    models = torch.arange(len(table), device=x.device)[:, None, None]
    seen = torch.nn.functional.embedding(x + models * table.shape[1], table.flatten(0, 1))
    mask = (x > 0).unsqueeze(-1)
    return (seen * mask).sum(2) / mask.sum(2).clamp(min=1) @ a + b


def image_logits(weights: list[Tensor], x: Tensor) -> Tensor:
    """Three 3 x 3 convolutions, each halved, and the mean over what is left; x uint8 [M, B, 3, 32, 32]."""
    from torch.nn.functional import max_pool2d, unfold

    x = x.float() / 127.5 - 1
    for weight, bias in (weights[0:2], weights[2:4], weights[4:6]):
        m, n, _, side, _ = x.shape
        columns = unfold(x.flatten(0, 1), 3, padding=1).unflatten(0, (m, n))
        y = weight.transpose(1, 2)[:, None] @ columns + bias.transpose(1, 2)[:, None]
        y = y.relu().unflatten(-1, (side, side)).flatten(0, 1)
        x = max_pool2d(y, 2).unflatten(0, (m, n))
    return x.mean((-2, -1)) @ weights[6] + weights[7]


def accuracies(judge: Judge, data: dict[str, Tensor], kept: Sequence[np.ndarray], seeds: Sequence[int]) -> list[float]:
    """Accuracy on the dev set of one model for each choice of examples and seed, all trained at once."""
    import torch
    from torch.nn.functional import cross_entropy

    device, m = data["x_train"].device, len(kept)
    begun, rows = zip(*(beginning(judge, *one) for one in zip(kept, seeds, strict=True)), strict=True)
    weights = [torch.stack(parts).to(device).requires_grad_() for parts in zip(*begun, strict=True)]
    order = torch.stack(rows, 1).to(device)
    optimizer = torch.optim.AdamW(weights, lr=judge.lr, weight_decay=judge.decay)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, judge.steps)
    for batch in order:
        logits = judge.logits(weights, data["x_train"][batch])
        # A sum over models, each with weights of its own, gives each the gradient that it would have alone.
        loss = cross_entropy(logits.flatten(0, 1), data["y_train"][batch].flatten(), reduction="sum") / judge.batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    right = torch.zeros(m, device=device)
    with torch.no_grad():
        for x, y in zip(data["x_dev"].split(100), data["y_dev"].split(100), strict=True):
            right += (judge.logits(weights, x.expand(m, *x.shape)).argmax(-1) == y).sum(1)
    return (right / len(data["y_dev"])).tolist()


def beginning(judge: Judge, kept: np.ndarray, seed: int) -> tuple[list[Tensor], Tensor]:
    """First weights of a model, and the examples of each step, int64 [steps, batch]; both from the seed alone."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    # Biases begin at zero, tables of words small, and what multiplies so that its output has the size of its input.
    scales = [{1: 0.0, WORDS: 0.1}.get(shape[0], (2 / shape[0]) ** 0.5) for shape in judge.shapes]
    weights = [torch.randn(s, generator=generator) * scale for s, scale in zip(judge.shapes, scales, strict=True)]
    rows = torch.randint(len(kept), (judge.steps, judge.batch), generator=generator)
    return weights, torch.from_numpy(kept)[rows]


def tensors(folder: Path, judge: str, device: str) -> dict[str, Tensor]:
    import torch

    names = {"x": "x" if judge == "head" else "raw", "y": "y"}
    found = {f"{a}_{p}": torch.from_numpy(np.load(folder / f"{b}_{p}.npy")) for a, b in names.items() for p in PARTS}
    if judge == "head":
        mean, deviation = found["x_train"].mean(0), found["x_train"].std(0).clamp(min=1e-6)
        found |= {f"x_{part}": (found[f"x_{part}"] - mean) / deviation for part in PARTS}
    return {name: (value.long() if value.dtype == torch.int32 else value).to(device) for name, value in found.items()}
