"""Block lists turned around: which queries read each block of keys, for gradients of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor


def turned_around(counts: Tensor, partials: Tensor, indices: Tensor, n_cols: int) -> tuple[Tensor, Tensor]:
    """For each block of keys the entries of the lists that name it, without asking the device for anything.

    Args:
        counts: int32 [1 or H, rows].
        partials: int32 like `counts`.
        indices: int32 [1 or H, rows, width], below `n_cols`.
        n_cols: blocks of keys.
    Returns:
        int32 [entries], places in the flattened `indices` sorted by list head and key block, masked ones first, and
        int32 [(1 or H) * n_cols * 2 + 1], where the masked and the other entries of a key block begin.
    """
    heads, _, width = indices.shape
    slot = torch.arange(width, device=indices.device)
    head = torch.arange(heads, device=indices.device)[:, None, None] * n_cols
    column = 2 * (indices + head) + (slot >= partials.unsqueeze(-1))
    column = torch.where(slot < counts.unsqueeze(-1), column, 2 * heads * n_cols).flatten()
    sorted_columns, order = torch.sort(column, stable=True)
    bounds = torch.arange(2 * heads * n_cols + 1, device=indices.device, dtype=sorted_columns.dtype)
    return order.to(torch.int32), torch.searchsorted(sorted_columns, bounds).to(torch.int32)


def cut(bounds: Tensor, n_cols: int, chunk: int, most: int) -> tuple[Tensor, Tensor]:
    """The programs of the second kernel, those of blocks with many readers side by side.

    Args:
        bounds: from `turned_around`.
        n_cols: blocks of keys.
        chunk: readers of a program, in blocks of queries of one head.
        most: programs that there may be.
    Returns:
        int32 [2, most], block of keys (`n_cols` past the last program) and number of the chunk, and int32 [n_cols],
        chunks of each block, at least one.
    """
    readers = (bounds[2::2] - bounds[:-1:2]).view(-1, n_cols).amax(0)
    n_chunks = ((readers + chunk - 1) // chunk).clamp(min=1)
    ends = n_chunks.cumsum(0)
    item = torch.arange(most, device=bounds.device)
    block = torch.searchsorted(ends, item, right=True)
    first = (ends - n_chunks)[block.clamp(max=n_cols - 1)]
    return torch.stack([block, item - first]).to(torch.int32), n_chunks.to(torch.int32)
