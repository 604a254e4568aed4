"""Shapes of column statistics, from which keys are chosen; shared by CPU, interpreter and GPU."""

import torch

# (batch, heads, kv_heads, queries, keys, dim, causal, padded)
STATS = (
    (2, 4, 2, 63, 63, 64, True, False),
    (1, 2, 1, 16, 100, 80, True, False),
    (1, 2, 2, 70, 70, 96, False, False),
    (2, 2, 1, 90, 90, 64, True, True),
    (1, 2, 1, 40, 40, 256, True, False),
)
LARGE_STATS = (
    *STATS,
    (2, 32, 8, 1000, 1000, 128, True, False),
    (1, 8, 2, 64, 4097, 128, True, False),
    (2, 4, 4, 1000, 1000, 64, False, True),
)


def stats_inputs(shape, dtype, device, seed=0):
    """Queries, keys, their log-sum-exp in float64 and the rest of the arguments of `column_stats`."""
    batch, heads, kv_heads, n_queries, n_keys, dim, causal, padded = shape
    draw = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(batch, n, h, dim, generator=draw).to(dtype).transpose(1, 2)
        for n, h in ((n_queries, heads), (n_keys, kv_heads))
    )
    starts = ends = None
    if padded:
        starts = torch.randint(1, n_keys // 3, (batch,), generator=draw, dtype=torch.int32)
        ends = n_keys - torch.randint(0, n_keys // 4, (batch,), generator=draw, dtype=torch.int32)
    weights, lse = probabilities(q, k, starts, ends, causal)
    moved = [None if t is None else t.to(device) for t in (q, k, lse.float(), starts, ends, weights)]
    return moved[0], moved[1], moved[2], moved[3], moved[4], n_keys - n_queries, causal, dim**-0.5, moved[5]


def probabilities(q, k, starts, ends, causal):
    """Attention probabilities float64 [B, H, S, T] from the matrix itself, and the log-sum-exp [B, H, S]."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)
    at_q = torch.arange(n_keys - n_queries, n_keys)[:, None]
    at_k = torch.arange(n_keys)
    seen = (at_q >= at_k if causal else at_q >= 0)[None].expand(len(q), -1, n_keys)
    if starts is not None:
        first, end = starts[:, None, None], ends[:, None, None]
        seen = seen & (at_k >= first) & (at_k < end) & (at_q >= first) & (at_q < end)
    scores = (scores * q.shape[-1] ** -0.5).masked_fill(~seen[:, None], float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0), scores.logsumexp(-1)
