"""Columns and diagonals that the last queries attend to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunekit.runtime.attention.patterns._checks import at_least
from prunekit.runtime.attention.patterns._scored import BLOCK, DenseSteps
from prunekit_kernels.block_scores import scored_lists
from prunekit_kernels.block_sparse_prefill import BlockLists


@dataclass(frozen=True)
class VerticalSlash(DenseSteps):
    """Every query reads some columns of blocks and some diagonals of blocks, by head; steps are dense.

    The last `probe_tokens` queries attend to everything; their weights are summed by block of keys (columns) and by
    distance in blocks (diagonals). The best columns and diagonals are read by the whole prompt. The first column and
    the main diagonal always are.

    Args:
        vertical_blocks: columns of 128 keys, 1 or more.
        slash_blocks: diagonals of 128 distances, 1 or more; each touches two blocks of a row.
        probe_tokens: queries that are asked, 1 or more.
    """

    vertical_blocks: int = 8
    slash_blocks: int = 8
    probe_tokens: int = 64

    causal: ClassVar[bool] = True
    paper: ClassVar[tuple[str, str]] = (
        "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        "https://arxiv.org/abs/2407.02490",
    )
    evidence: ClassVar[str] = "text and code: the last 64 queries, sums over columns and diagonals, top of each"
    deviations: ClassVar[str] = (
        "columns and diagonals in blocks of 128 instead of single ones; the same numbers for all heads instead of a "
        "search for each"
    )
    status: ClassVar[Literal["preview", "stable"]] = "preview"
    example: ClassVar[dict[str, int]] = {"vertical_blocks": 1, "slash_blocks": 1}

    def __post_init__(self) -> None:
        at_least(self, vertical_blocks=1, slash_blocks=1, probe_tokens=1)

    def prompt_lists(self, q: Tensor, k: Tensor, scale: float) -> BlockLists | None:
        """Columns and diagonals of each head."""
        n_queries, n_keys, cols = q.shape[2], k.shape[2], -(-k.shape[2] // BLOCK)
        vertical, slash = self._sums(q[0, :, -self.probe_tokens :], k[0], scale)
        vertical[:, 0] = float("inf")
        slash[:, 0] = float("inf")
        column = torch.zeros_like(vertical, dtype=torch.bool)
        column.scatter_(1, vertical.topk(min(self.vertical_blocks, cols), 1).indices, True)
        diagonal = torch.zeros(slash.shape[0], cols + 1, dtype=torch.bool, device=q.device)
        diagonal.scatter_(1, slash.topk(min(self.slash_blocks, cols), 1).indices, True)
        # Distances from 128 o to 128 o + 127 reach from the block o back into the one before it.
        diagonal[:, 1:] |= diagonal[:, :-1].clone()
        first = n_keys - n_queries
        row = (first + torch.arange(-(-n_queries // BLOCK), device=q.device) * BLOCK) // BLOCK
        back = (row[:, None] - torch.arange(cols, device=q.device)).clamp(min=-1)
        listed = column[:, None, :] | (diagonal[:, back.clamp(min=0)] & (back >= 0))
        if first % BLOCK:
            # A row that starts inside a block reaches into the next one, with the same distances.
            listed |= diagonal[:, (back + 1).clamp(min=0)]
        window = 1 if first % BLOCK == 0 else 2
        return scored_lists(listed.float(), n_queries, n_keys, window=window)

    def _sums(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Weights of the last queries summed by block of keys and by distance in blocks, float32 [H, cols] each."""
        probes, n_keys, cols = q.shape[1], k.shape[1], -(-k.shape[1] // BLOCK)
        position = n_keys - probes + torch.arange(probes, device=q.device)
        distance = position[:, None] - torch.arange(n_keys, device=q.device)
        by_column, by_distance = [], []
        for part, keys in zip(q.unflatten(0, (k.shape[0], -1)), k, strict=True):
            scores = (part @ keys.T).float() * scale
            weights = scores.masked_fill(distance < 0, float("-inf")).softmax(-1)
            sums = pad(weights.sum(1), (0, cols * BLOCK - n_keys))
            by_column.append(sums.unflatten(1, (cols, BLOCK)).sum(2))
            far = torch.zeros(weights.shape[0], cols, device=q.device)
            index = (distance.clamp(min=0) // BLOCK).flatten().expand(weights.shape[0], -1)
            by_distance.append(far.scatter_add_(1, index, weights.flatten(1)))
        return torch.cat(by_column), torch.cat(by_distance)
