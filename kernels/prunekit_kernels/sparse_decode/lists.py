"""Which cached tokens each key-value head of each sequence reads, as the decode kernel takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PageLists:
    """A list of pages for each sequence and key-value head.

    A list names pages of `page_tokens` tokens in any order. All of them are full but the last named, which holds what
    is left of `tokens`. Heads may share a list (equal `starts`) or have lists of their own lengths. With several
    queries a sequence, the last tokens of a list are the queries' own, in their order.

    Args:
        indices: int32 [N], page numbers: pages of a paged cache, or blocks of the sequence in a contiguous cache.
        starts: int32 [B, G], where the list of a sequence and head begins in `indices`.
        tokens: int32 [B, G], how many tokens the list reads; zero reads nothing.
        page_tokens: tokens of a page; 1 makes it a list of tokens.
        paged: whether `indices` speak of a paged cache [pages, page_tokens, G, D].
        longest: at least the largest of `tokens`, known without asking the device. A replayed CUDA graph keeps it.
        total: about the sum of `tokens`; it decides how the work is cut and changes no result but by rounding.
    """

    indices: Tensor
    starts: Tensor
    tokens: Tensor
    page_tokens: int
    paged: bool
    longest: int
    total: int

    def to(self, device: torch.device | str) -> PageLists:
        """The same lists on another device."""
        moved = (t.to(device) for t in (self.indices, self.starts, self.tokens))
        return replace(self, **dict(zip(("indices", "starts", "tokens"), moved, strict=True)))

    @classmethod
    def from_table(
        cls, table: Tensor, tokens: Tensor, kv_heads: int, page_tokens: int, *, paged: bool, longest: int | None = None
    ) -> PageLists:
        """Lists from a rectangular table, without asking the device for anything.

        Args:
            table: integers [B, 1 or G, W], one row for all heads or one for each; what lies past a row's tokens is
                never read.
            tokens: integers [B, 1 or G], tokens that each row reads.
            kv_heads: G.
            page_tokens: tokens of a page.
            paged: as in the class.
            longest: as in the class; the width of the table if None.
        """
        batch, rows, width = table.shape
        first = torch.arange(batch * rows, dtype=torch.int32, device=table.device).view(batch, rows) * width
        longest = width * page_tokens if longest is None else longest
        return cls(
            indices=table.to(torch.int32).reshape(-1),
            starts=first.expand(batch, kv_heads).contiguous(),
            tokens=tokens.to(torch.int32).expand(batch, kv_heads).contiguous(),
            page_tokens=page_tokens, paged=paged, longest=longest, total=batch * kv_heads * longest,
        )  # fmt: skip

    @classmethod
    def from_mask(cls, mask: Tensor, kv_heads: int) -> PageLists:
        """Lists of single tokens of a contiguous cache, without asking the device for anything.

        Args:
            mask: bool [B, 1 or G, S], true for the tokens that are read.
            kv_heads: G.
        """
        size = mask.shape[-1]
        place = torch.where(mask, mask.cumsum(-1) - 1, size)
        table = torch.zeros(*mask.shape[:-1], size + 1, dtype=torch.int64, device=mask.device)
        table.scatter_(-1, place, torch.arange(size, device=mask.device).expand_as(place))
        return cls.from_table(table[..., :size], mask.sum(-1), kv_heads, 1, paged=False)

    @classmethod
    def from_lists(
        cls, pages: Sequence[Sequence[Tensor]], page_tokens: int, *, paged: bool, tokens: Tensor | None = None
    ) -> PageLists:
        """Ragged lists, one tensor of page numbers for each sequence and head.

        Args:
            pages: `pages[b][g]` is the list of sequence b and key-value head g.
            page_tokens: tokens of a page.
            paged: as in the class.
            tokens: integers [B, G] if last pages are not full.
        """
        counts = torch.tensor([[len(row) for row in rows] for rows in pages], dtype=torch.int32)
        flat = torch.cat([row.reshape(-1) for rows in pages for row in rows]).to(torch.int32)
        ends = counts.flatten().cumsum(0).to(torch.int32).view_as(counts)
        read = counts * page_tokens if tokens is None else tokens.to("cpu", torch.int32)
        return cls(
            indices=flat, starts=(ends - counts).to(flat.device), tokens=read.to(flat.device),
            page_tokens=page_tokens, paged=paged, longest=int(read.max()), total=int(read.sum()),
        )  # fmt: skip

    @classmethod
    def whole(cls, tokens: Tensor, longest: int, page_tokens: int = 64) -> PageLists:
        """Everything a contiguous cache holds: one list 0, 1, 2, ... that all sequences and heads share.

        Args:
            tokens: integers [B, G], cached tokens; they may differ between heads.
            longest: at least the largest of `tokens`.
            page_tokens: block size that the kernel walks in.
        """
        indices = torch.arange(-(-longest // page_tokens), dtype=torch.int32, device=tokens.device)
        read = tokens.to(torch.int32).contiguous()
        return cls(indices, torch.zeros_like(read), read, page_tokens, False, longest, read.numel() * longest)
