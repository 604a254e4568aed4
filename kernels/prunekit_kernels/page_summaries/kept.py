"""Page summaries that grow with a cache: what is kept from step to step, and what tells whether it still holds.

Shapes: B batch, G heads, T tokens that the cache can hold, D head size, P pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeptPages:
    """Summaries of a cache's pages and the newest keys that they were made from; all of it is written in place.

    Args:
        summaries: means, or smallest and largest values, [B, G, P, D] each, contiguous.
        newest: [B, G, page_tokens, D], the last keys that the summaries cover, at the end.
        covered: int32 [B, G], how many keys the summaries cover; zero makes all pages be made again.
        first: int32 [B, G], room for the first page that a step makes again as far as a head tells; the least counts.
    """

    summaries: tuple[Tensor, ...]
    newest: Tensor
    covered: Tensor
    first: Tensor

    @classmethod
    def room(cls, x: Tensor, page_tokens: int, n_pages: int, mean: bool) -> KeptPages:
        """Room for the summaries of `n_pages` pages of a cache [B, G, T, D], which cover nothing yet."""
        batch, heads, _, dim = x.shape
        # Zeros, because pages past the newest are scored too before their score is dropped.
        kept = tuple(x.new_zeros(batch, heads, n_pages, dim) for _ in range(1 if mean else 2))
        covered = torch.zeros(batch, heads, dtype=torch.int32, device=x.device)
        return cls(kept, x.new_zeros(batch, heads, page_tokens, dim), covered, torch.zeros_like(covered))

    def grown(self, n_pages: int) -> KeptPages:
        """The same with room for `n_pages` pages; where it has to be made, for some more, so that few steps copy."""
        had = self.summaries[0].shape[2]
        if had >= n_pages:
            return self
        wide = tuple(t.new_zeros(*t.shape[:2], n_pages + n_pages // 8 + 8, t.shape[3]) for t in self.summaries)
        for new, old in zip(wide, self.summaries, strict=True):
            new[:, :, :had] = old
        return replace(self, summaries=wide)

    def fits(self, x: Tensor) -> bool:
        """Whether these can be summaries of a cache [B, G, T, D], by shape, type and place."""
        mine = (*self.newest.shape[:2], self.newest.shape[3], self.newest.dtype, self.newest.device)
        return mine == (*x.shape[:2], x.shape[3], x.dtype, x.device)
