"""Which key blocks each block of queries reads, as the kernels take it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockLists:
    """Key-block lists of a static or scored pattern.

    The first dimension is 1 when one list serves all query heads, else the number of query heads. A row is a block of
    `block_q` queries; its partial blocks come first, then its full ones. Query `i` stands at position `q_offset + i`
    of the keys.

    Args:
        counts: int32 [1 or H, rows], listed blocks of a row.
        partials: int32 [1 or H, rows], how many of them, the leading ones, are masked inside.
        indices: int32 [1 or H, rows, width], key-block numbers.
        mask_ids: int32 [1 or H, rows, partial width] into `masks`, or None when the mask inside partial blocks is only
            causality (if `causal`) and the end of the keys.
        masks: int32 [n, block_q, block_k / 32], bit b of word w speaks for key `32 w + b` of the block, or None.
        pairs: query-key pairs that are read, all rows and list heads together; 0 where nobody counted.
        shortest: smallest count of any row.
        biases: float32 like `indices`, added to all scores of a listed block, or None. A block of keys that each stand
            for r tokens gets log r.
    """

    counts: Tensor
    partials: Tensor
    indices: Tensor
    mask_ids: Tensor | None
    masks: Tensor | None
    block_q: int
    block_k: int
    n_queries: int
    n_keys: int
    q_offset: int
    causal: bool
    pairs: int
    shortest: int
    biases: Tensor | None = None

    @property
    def touched(self) -> int:
        """Listed blocks, all rows and list heads together."""
        return int(self.counts.sum())

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Counts, partial counts, indices, mask numbers and masks: what launches take, in their order."""
        return self.counts, self.partials, self.indices, self.mask_ids, self.masks

    @property
    def numbers(self) -> tuple[int, int, int, bool]:
        """Both block sizes, offset of the queries and causality: what launches take behind the tensors."""
        return self.block_q, self.block_k, self.q_offset, self.causal

    def to(self, device: torch.device | str) -> BlockLists:
        """The same lists on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            counts=self.counts.to(device),
            partials=self.partials.to(device),
            indices=self.indices.to(device),
            mask_ids=move(self.mask_ids),
            masks=move(self.masks),
            biases=move(self.biases),
        )

    def dense(self) -> Tensor:
        """Bool [1 or H, queries, keys], true where a query reads a key."""
        return expand(
            *self.tensors, self.block_q, self.block_k, self.n_queries, self.n_keys, self.q_offset, self.causal
        )


def pack_bits(mask: Tensor) -> Tensor:
    """Packs bool [..., 32 w] into int32 [..., w], bit b of word w from element `32 w + b`."""
    words = mask.reshape(*mask.shape[:-1], mask.shape[-1] // 32, 32).to(torch.int64)
    values = (words << torch.arange(32, device=mask.device)).sum(-1)
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)


def unpack_bits(words: Tensor) -> Tensor:
    """Inverse of `pack_bits`."""
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=words.device, dtype=torch.int32)) & 1
    return bits.bool().flatten(-2)


def expand(
    counts: Tensor, partials: Tensor, indices: Tensor, mask_ids: Tensor | None, masks: Tensor | None,
    block_q: int, block_k: int, n_queries: int, n_keys: int, q_offset: int, causal: bool,
) -> Tensor:  # fmt: skip
    """Bool [list heads, queries, keys] of block lists given as tensors; see `BlockLists`."""
    heads, rows, width = indices.shape
    n_cols = -(-n_keys // block_k)
    slot = torch.arange(width, device=indices.device)
    listed = slot < counts.unsqueeze(-1)
    partial = slot < partials.unsqueeze(-1)
    cells = torch.zeros(heads, rows, n_cols, block_q, block_k, dtype=torch.bool, device=indices.device)
    head, row, at = (listed & ~partial).nonzero(as_tuple=True)
    cells[head, row, indices[head, row, at].long()] = True
    head, row, at = (listed & partial).nonzero(as_tuple=True)
    col = indices[head, row, at].long()
    if masks is not None and mask_ids is not None:
        cells[head, row, col] = unpack_bits(masks)[mask_ids[head, row, at].long()]
    else:
        q_at = q_offset + row[:, None] * block_q + torch.arange(block_q, device=indices.device)
        k_at = col[:, None] * block_k + torch.arange(block_k, device=indices.device)
        seen = (k_at < n_keys)[:, None, :].expand(-1, block_q, -1)
        cells[head, row, col] = seen & (q_at[:, :, None] >= k_at[:, None, :]) if causal else seen
    dense = cells.permute(0, 1, 3, 2, 4).reshape(heads, rows * block_q, n_cols * block_k)
    return dense[:, :n_queries, :n_keys]


def expand_biases(
    biases: Tensor, counts: Tensor, indices: Tensor, block_q: int, block_k: int, n_queries: int, n_keys: int
) -> Tensor:
    """Float32 [list heads, queries, keys], the bias of each pair of a listed block and zero elsewhere."""
    heads, rows, width = indices.shape
    n_cols = -(-n_keys // block_k)
    listed = torch.arange(width, device=indices.device) < counts.unsqueeze(-1)
    head, row, at = listed.nonzero(as_tuple=True)
    cells = torch.zeros(heads, rows, n_cols, dtype=torch.float32, device=indices.device)
    cells[head, row, indices[head, row, at].long()] = biases[head, row, at]
    return cells.repeat_interleave(block_q, 1).repeat_interleave(block_k, 2)[:, :n_queries, :n_keys]
