"""Column statistics in plain torch: slow, right, on any device.

Shapes: B batch, H query heads, G key-value heads, S queries, T keys, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_QUERIES = 1024


def stats_reference(
    q: Tensor, k: Tensor, lse: Tensor, starts: Tensor | None, ends: Tensor | None, q_offset: int, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `column_stats` returns, computed in float32, or in float64 if the queries are."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, n_queries, _ = q.shape
    n_keys, group = k.shape[2], heads // k.shape[1]
    sums = torch.zeros(batch, heads, n_keys, dtype=kind, device=q.device)
    most = torch.zeros_like(sums)
    wide_k = k.to(kind).repeat_interleave(group, 1)
    at_k = torch.arange(n_keys, device=q.device)
    for first in range(0, n_queries, CHUNK_QUERIES):
        rows = slice(first, first + CHUNK_QUERIES)
        at_q = torch.arange(n_queries, device=q.device)[rows]
        scores = q[:, :, rows].to(kind) @ wide_k.transpose(2, 3) * scale
        read = lse[:, :, rows].to(kind)
        # A query that reads nothing has minus infinity there, and gives nothing.
        weights = torch.exp(scores - read.masked_fill(read == float("-inf"), float("inf")).unsqueeze(-1))
        seen = torch.ones(len(at_q), n_keys, dtype=torch.bool, device=q.device)
        if causal:
            seen = q_offset + at_q[:, None] >= at_k
        seen = seen[None].expand(batch, -1, -1)
        if starts is not None and ends is not None:
            inside = (at_k >= starts[:, None]) & (at_k < ends[:, None])
            mine = (q_offset + at_q >= starts[:, None]) & (q_offset + at_q < ends[:, None])
            seen = seen & inside[:, None, :] & mine[:, :, None]
        weights = torch.where(seen[:, None], weights, 0.0)
        sums += weights.sum(2)
        most = torch.maximum(most, weights.amax(2))
    return sums.float(), most.float()
