"""Decode over page lists in plain torch: slow, right, on any device, for tests and for machines without a kernel.

Shapes: B sequences, H query heads, G key-value heads, Q queries a sequence, D head size, P pages.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one key-value head's queries to the tokens of one list.

    Args:
        q: [R, Q, D], the R query heads of the group.
        k: [n, D], the listed keys in the order of the list; `v` alike.
        scale: factor on the scores.
    Returns:
        Output [R, Q, D] and log-sum-exp [R, Q] (natural logarithm) in the dtype of `q`. Query i of Q leaves out the
        last Q - 1 - i tokens; one that reads no token gives zeros and minus infinity.
    """
    n, queries = k.shape[0], q.shape[1]
    ends = n - queries + 1 + torch.arange(queries, device=q.device)
    mask = torch.arange(n, device=q.device) < ends[:, None]
    scores = ((q @ k.T) * scale).masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    return weights @ v, lse


def listed(
    cache: Tensor, indices: Tensor, start: int, tokens: int, page_tokens: int, paged: bool, batch: int, head: int
) -> Tensor:
    """Cache rows [tokens, D] that one list names, in its order."""
    places = torch.arange(tokens, device=cache.device)
    pages = indices[start + places // page_tokens].long()
    if paged:
        return cache[pages, places % page_tokens, 0 if cache.shape[2] == 1 else head]
    return cache[batch, head, pages * page_tokens + places % page_tokens]


def decode_reference(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, starts: Tensor, tokens: Tensor,
    page_tokens: int, paged: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the kernel computes, from the same tensors, in float32, or in float64 if the queries are.

    See `sparse_decode` for the arguments.
    """
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, _ = q.shape
    kv_heads = starts.shape[1]
    group = heads // kv_heads
    out = q.new_zeros(q.shape)
    lse = q.new_full((batch, heads, queries), float("-inf"), dtype=torch.float32)
    first, count = starts.tolist(), tokens.tolist()
    for b in range(batch):
        for g in range(kv_heads):
            mine = slice(g * group, (g + 1) * group)
            where = (indices, first[b][g], count[b][g], page_tokens, paged, b, g)
            keys, values = listed(k, *where).to(kind), listed(v, *where).to(kind)
            result, sums = attend(q[b, mine].to(kind), keys, values, scale)
            out[b, mine], lse[b, mine] = result.to(q.dtype), sums.float()
    return out, lse
