"""Block scores and block choice in plain torch: slow, right, on any device.

Shapes: B batch, H query heads, G key-value heads, S queries, T keys, D head size, R query blocks, C key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

LEAST, MOST = -(2**31), 2**31 - 1


def folded_scores(
    q: Tensor, k: Tensor, stride: int, step: int, block_q: int, block_k: int, q_offset: int, causal: bool, scale: float
) -> Tensor:
    """What `antidiagonal_scores` computes, in float32, or in float64 if the queries are."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, cols = -(-q.shape[2] // block_q), -(-k.shape[2] // block_k)
    folded_q, folded_k = -(-q.shape[2] // stride), -(-k.shape[2] // stride)
    run = scored_runs(folded_q, step, q.device)
    wide_q = pad(q.to(kind), (0, 0, 0, folded_q * stride - q.shape[2])).unflatten(2, (folded_q, stride))
    wide_q = wide_q[:, :, run].flip(3)
    wide_k = pad(k.to(kind), (0, 0, 0, folded_k * stride - k.shape[2])).unflatten(2, (folded_k, stride))
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], rows, cols, dtype=torch.float32, device=q.device)
    last = q_offset + (run + 1) * stride - 1
    hidden = torch.arange(folded_k, device=q.device) * stride > last[:, None]
    for head in range(q.shape[1]):
        scores = wide_q[:, head].flatten(2) @ wide_k[:, head // group].flatten(2).transpose(1, 2) * (scale / stride)
        if causal:
            scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(-1)
        spare = rows * (block_q // (stride * step)) - len(run)
        weights = pad(weights, (0, cols * (block_k // stride) - folded_k, 0, spare))
        out[:, head] = weights.unflatten(2, (cols, -1)).sum(3).unflatten(1, (rows, -1)).sum(2).float()
    return out


def scored_runs(n_runs: int, step: int, device: torch.device) -> Tensor:
    """Numbers of the runs of queries that are scored: the last of each `step`, and the last of all."""
    return ((torch.arange(-(-n_runs // step), device=device) + 1) * step - 1).clamp(max=n_runs - 1)


def chosen_blocks(
    scores: Tensor, block_q: int, block_k: int, n_queries: int, n_keys: int, q_offset: int, causal: bool,
    keep: int, mass: float, sink: int, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Bool [..., R, C], the chosen blocks, and which blocks want a mask inside; see `select_blocks`."""
    rows, cols = scores.shape[-2:]
    c = torch.arange(cols, device=scores.device)
    first = q_offset + torch.arange(rows, device=scores.device)[:, None] * block_q
    last = (first + block_q - 1).clamp(max=q_offset + n_queries - 1)
    seen = (c <= last // block_k) if causal else (c < cols).expand(rows, cols)
    near = (c > first // block_k - window) & (c < last // block_k + window)
    forced = seen & ((c < sink) | near)
    bits = scores.float().contiguous().view(torch.int32)
    key = (bits ^ ((bits >> 31) & MOST)).to(torch.int64)
    key = torch.where(forced, MOST, torch.where(seen, key, LEAST))
    # Of equal blocks the nearer, which has the larger number, comes first.
    order = torch.argsort(key.flip(-1), dim=-1, descending=True, stable=True)
    if keep > 0:
        count = torch.maximum(seen.sum(-1).clamp(max=keep), forced.sum(-1))
        rank = torch.empty_like(order)
        rank.scatter_(-1, order, torch.arange(cols, device=scores.device).expand_as(order).contiguous())
        chosen = (rank.flip(-1) < count[..., None]) & seen
    elif mass > 0:
        counted = torch.where(seen, scores.float(), 0.0)
        sums = counted.flip(-1).gather(-1, order).cumsum(-1)
        enough = sums >= mass * counted.sum(-1, keepdim=True)
        at = torch.where(enough.any(-1, keepdim=True), enough.int().argmax(-1, keepdim=True), cols - 1)
        chosen = (key >= key.flip(-1).gather(-1, order).gather(-1, at)) & seen
    else:
        chosen = forced | (seen & (scores > 0))
    masked = (c + 1) * block_k > n_keys
    masked = masked | (c * block_k + block_k - 1 > first) if causal else masked.expand(rows, cols)
    return chosen, masked


def select_reference(
    scores: Tensor, block_q: int, block_k: int, n_queries: int, n_keys: int, q_offset: int, causal: bool,
    keep: int, mass: float, sink: int, window: int, width: int, ascending: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What `select_blocks` returns, from the same tensors."""
    chosen, masked = chosen_blocks(
        scores, block_q, block_k, n_queries, n_keys, q_offset, causal, keep, mass, sink, window
    )  # fmt: skip
    cols = scores.shape[-1]
    partial = chosen & masked
    c = torch.arange(cols, device=scores.device)
    rank = c.expand_as(chosen) if ascending else (cols - 1 - c) + torch.where(partial, 0, cols)
    rank = torch.where(chosen, rank, 2 * cols)
    order = torch.argsort(rank, dim=-1, stable=True)[..., :width]
    counts = chosen.sum(-1).to(torch.int32)
    listed = torch.arange(width, device=scores.device) < counts[..., None]
    return counts, partial.sum(-1).to(torch.int32), torch.where(listed, order, 0).to(torch.int32)
