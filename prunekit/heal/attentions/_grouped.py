"""Attention inside groups of tokens, with a few tokens that every query may read besides.

B: sequences, H: query heads, K: KV heads, T: tokens, D: head width, G: groups, g: tokens in each, m: shared tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Groups:
    """Who reads whom: q reads k <= q if both lie in one group and on one side, or if k is shared.

    Args:
        order: positions group after group, a permutation of all, int64 [T].
        side: of each position, int64 [T]; tokens of one group on two sides do not read each other.
        shared: positions that every query may read, int64 [m], none twice.
        size: tokens in a group.
    """

    order: Tensor
    side: Tensor
    shared: Tensor
    size: int

    def mask(self) -> Tensor:
        """Which keys, the shared ones before those of the group, each query of each group reads: bool [G, g, m + g].

        A shared key that lies in the query's own group is read there.
        """
        here = self.order.view(-1, self.size)
        side = self.side[here]
        own = (here[:, None, :] <= here[:, :, None]) & (side[:, None, :] == side[:, :, None])
        group = torch.empty_like(self.order)
        group[self.order] = torch.arange(len(self.order), device=group.device) // self.size
        inside = group[self.shared] == torch.arange(len(here), device=group.device)[:, None]
        read_there = inside[:, None, :] & (self.side[self.shared] == side[:, :, None])
        return torch.cat([(self.shared <= here[:, :, None]) & ~read_there, own], -1)


def attend(query: Tensor, key: Tensor, value: Tensor, groups: Groups, scaling: float | None) -> Tensor:
    """Attention in groups; its products are T (m + g) instead of T T.

    Args:
        query: [B, H, T, D].
        key: [B, K, T, D], K divides H; `value` alike.
        groups: of the T tokens.
        scaling: of the products; None for 1 / sqrt(D).
    Returns:
        [B, H, T, D].
    """
    batch, heads, tokens, width = query.shape
    n = tokens // groups.size

    def grouped(states: Tensor) -> Tensor:
        return states[:, :, groups.order].reshape(batch, states.shape[1], n, groups.size, width)

    def with_shared(states: Tensor) -> Tensor:
        shared = states[:, :, groups.shared].unsqueeze(2).expand(-1, -1, n, -1, -1)
        joined = torch.cat([shared, grouped(states)], 3)
        return joined.repeat_interleave(heads // states.shape[1], 1).flatten(1, 2)

    mask = groups.mask().repeat(heads, 1, 1)
    found = scaled_dot_product_attention(
        grouped(query).flatten(1, 2), with_shared(key), with_shared(value), attn_mask=mask, scale=scaling
    )
    back = torch.empty_like(groups.order)
    back[groups.order] = torch.arange(tokens, device=back.device)
    return found.view(batch, heads, tokens, width)[:, :, back]
