"""Block-sparse prefill on a CPU: listed blocks of keys are gathered, and torch's flash attention reads them.

Blocks without a mask and blocks with one are read apart, so that a mask costs where it is needed alone, and joined by
their log-sum-exp. Rows that list equally many blocks go in one call. Where the lists are all of dense attention, no
block is gathered. Products and softmax as separate operations of torch were up to 1.2 times slower on one thread of an
x86-64 CPU (384 rows, 512 to 8,192 keys, head size 64), and their many short parallel regions wait for each other
where other processes run.

Shapes: H query heads, G key-value heads, S queries, T keys, D head size, L lists (1 or H) of R rows, C key-value heads
that one list serves (G or 1), M queries that share a row and a key-value head (several heads' if one list serves all).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunekit_kernels._cpu import flash
from prunekit_kernels.block_sparse_prefill.lists import BlockLists, unpack_bits
from prunekit_kernels.merge.op import merge_reference

# Keys, values and masks gathered for one call. More leaves the caches, less leaves cores idle.
CHUNK_BYTES = 2**23


@dataclass(frozen=True)
class _Rows:
    """What the rows of all lists of one sequence read.

    `blocks`, int64 [L R, C, width], are numbers of key blocks, those of all key-value heads counted through. `masked`
    and `plain`, bool [L R, width], tell listed blocks with and without a mask from what is not listed. `added`, float
    [G blocks, block_k], are gates of keys.
    """

    lists: BlockLists
    blocks: Tensor
    masked: Tensor
    plain: Tensor
    n_keys: int
    added: Tensor | None
    free: int


def prefill(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, starts: Tensor | None = None,
    ends: Tensor | None = None, gates: Tensor | None = None, free: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `block_sparse_prefill` returns, for tensors on a CPU, in float32, or in float64 if the queries are.

    `n_queries` and `n_keys` of the lists are not looked at.
    """
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32)
    for b, at_q, at_k in _sequences(q, k, starts, ends):
        mine, keys, values = (t.to(kind) for t in (q[b, :, at_q], k[b, :, at_k], v[b, :, at_k]))
        if gates is None and _is_dense(lists, mine.shape[1], keys.shape[1]):
            found = _dense(mine, keys, values, lists.causal, scale)
        else:
            found = _sparse(mine, keys, values, lists, scale, None if gates is None else gates[b, :, at_k], free)
        out[b, :, at_q], lse[b, :, at_q] = found
    return out, lse


def _sequences(q: Tensor, k: Tensor, starts: Tensor | None, ends: Tensor | None) -> Iterator[tuple[int, slice, slice]]:
    """Row of the batch and slots of queries and keys of each sequence that has any."""
    if starts is None or ends is None:
        for b in range(q.shape[0]):
            yield b, slice(0, q.shape[2]), slice(0, k.shape[2])
        return
    for n, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if end > start:
            yield n if len(starts) == q.shape[0] else 0, slice(start, end), slice(start, end)


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of [H, S, D] to all keys; a key-value head is read by its group, not repeated."""
    grouped = q.unflatten(0, (k.shape[0], -1))
    keys, values = (t[:, None].expand(-1, grouped.shape[1], -1, -1) for t in (k, v))
    out, lse = flash(grouped, keys, values, scale, causal=causal)
    return out.flatten(0, 1), lse.flatten(0, 1)


def _is_dense(lists: BlockLists, n_queries: int, n_keys: int) -> bool:
    """Whether all that causality leaves is listed, for queries that stand at the first keys."""
    if lists.masks is not None or lists.biases is not None:
        return False
    if lists.causal and (lists.q_offset or n_queries != n_keys):
        return False
    rows = -(-n_queries // lists.block_q)
    seen = torch.full((rows,), n_keys)
    if lists.causal:
        seen = ((torch.arange(rows) + 1) * lists.block_q).clamp(max=n_queries)
    wanted = -(-seen // lists.block_k)
    indices, counts = lists.indices[:, :rows], lists.counts[:, :rows]
    listed = torch.arange(indices.shape[2]) < counts[..., None]
    return bool(((listed & (indices < wanted[:, None])).sum(-1) == wanted).all())


def _sparse(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, gates: Tensor | None, free: int
) -> tuple[Tensor, Tensor]:
    """Output [H, S, D] and log-sum-exp [H, S] of one sequence."""
    (heads, n_queries, dim), (kv_heads, n_keys) = q.shape, k.shape[:2]
    n_rows, n_cols = -(-n_queries // lists.block_q), -(-n_keys // lists.block_k)
    shared = lists.counts.shape[0] == 1
    fold = (kv_heads, heads // kv_heads, n_rows, lists.block_q)
    q = pad(q, (0, 0, 0, n_rows * lists.block_q - n_queries)).reshape(*fold, dim)
    q = q.permute(2, 0, 1, 3, 4).reshape(n_rows, kv_heads, -1, dim) if shared else q.reshape(-1, 1, lists.block_q, dim)
    blank = n_cols * lists.block_k - n_keys
    keys, values = (pad(t, (0, 0, 0, blank)).reshape(-1, lists.block_k, dim) for t in (k, v))
    added = None if gates is None else pad(gates, (0, blank)).to(q.dtype).view(-1, lists.block_k)
    rows = _rows(lists, n_rows, n_cols, n_keys, (heads, kv_heads), added, free)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), dtype=q.dtype)
    for has_mask in (True, False):
        for some, part, sums in _parts(q, keys, values, rows, scale, has_mask):
            if not has_mask:
                part, sums = merge_reference(out[some], lse[some], part, sums)
            out[some], lse[some] = part, sums
    if shared:
        out = out.view(n_rows, *fold[:2], lists.block_q, dim).permute(1, 2, 0, 3, 4)
        lse = lse.view(n_rows, *fold[:2], lists.block_q).permute(1, 2, 0, 3)
    return out.reshape(heads, -1, dim)[:, :n_queries], lse.reshape(heads, -1)[:, :n_queries]


def _rows(
    lists: BlockLists, n_rows: int, n_cols: int, n_keys: int, heads: tuple[int, int], added: Tensor | None, free: int
) -> _Rows:
    """The first `n_rows` rows of the lists, cut to the keys of a sequence that may be shorter than they are."""
    indices, counts, partials = (t[:, :n_rows].flatten(0, 1) for t in (lists.indices, lists.counts, lists.partials))
    slot, indices = torch.arange(indices.shape[1]), indices.long()
    listed = (slot < counts[:, None]) & (indices < n_cols)
    masked = listed & ((slot < partials[:, None]) | ((indices + 1) * lists.block_k > n_keys))
    first = torch.arange(heads[1])[None] * n_cols
    if lists.counts.shape[0] > 1:
        first = first.T.repeat_interleave(heads[0] // heads[1] * n_rows, 0)
    return _Rows(lists, first[..., None] + indices[:, None], masked, listed & ~masked, n_keys, added, free)


def _parts(
    q: Tensor, k: Tensor, v: Tensor, rows: _Rows, scale: float, has_mask: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of the lists with output [rows, C, M, D] and log-sum-exp [rows, C, M] over some of their blocks.

    Args:
        q: [L R, C, M, D].
        k: [G blocks, block_k, D]; `v` alike.
        rows: what is listed.
        scale: factor on the scores.
        has_mask: whether it is the blocks with a mask.
    """
    which = rows.masked if has_mask else rows.plain
    n = which.sum(-1)
    slots = (~which).to(torch.uint8).argsort(dim=-1, stable=True)
    adds = has_mask or rows.added is not None or rows.lists.biases is not None
    for count in n.unique().tolist():
        n_read = count * k.shape[1]
        size = (2 * q.shape[1] * k.shape[2] + adds * q.shape[2]) * n_read * q.element_size()
        for some in (n == count).nonzero()[:, 0].split(max(1, CHUNK_BYTES // size)) if count else ():
            slot = slots[some, :count]
            at = rows.blocks[some].gather(2, slot[:, None].expand(-1, q.shape[1], -1))
            keys, values = (t.index_select(0, at.flatten()).view(*at.shape[:2], n_read, -1) for t in (k, v))
            mask = _added(rows, some, slot, at, q.shape[2], has_mask).to(q.dtype) if adds else None
            yield some, *flash(q[some], keys, values, scale, mask=mask)


def _added(rows: _Rows, some: Tensor, slot: Tensor, at: Tensor, n_queries: int, has_mask: bool) -> Tensor:
    """What is added to the scores of some rows, [rows, 1 or C, M, keys]: masks, biases of blocks and gates of keys."""
    lists, (n, _, count) = rows.lists, at.shape
    n_rows = len(rows.masked) // lists.counts.shape[0]
    head, row = some // n_rows, some % n_rows
    col = lists.indices[head, row].long().gather(1, slot)
    q_at = lists.q_offset + row[:, None] * lists.block_q + torch.arange(lists.block_q)
    k_at = (col[..., None] * lists.block_k + torch.arange(lists.block_k)).flatten(1)
    found = torch.zeros(n, 1, lists.block_q, count * lists.block_k)
    if rows.added is not None:
        gates = rows.added[at].flatten(2)[:, :, None]
        found = torch.where((q_at[:, :, None] - k_at[:, None] >= rows.free)[:, None], gates, 0.0)
    if lists.biases is not None:
        biases = lists.biases[head, row].gather(1, slot)
        found = found + biases.repeat_interleave(lists.block_k, 1)[:, None, None]
    if has_mask:
        seen = (k_at < rows.n_keys)[:, None]
        if lists.masks is not None and lists.mask_ids is not None:
            ids = lists.mask_ids[head, row]
            cells = unpack_bits(lists.masks[ids.gather(1, slot.clamp(max=ids.shape[1] - 1)).long()])
            cells = cells | (slot >= lists.partials[head, row, None])[..., None, None]
            seen = seen & cells.transpose(1, 2).flatten(2)
        elif lists.causal:
            seen = seen & (q_at[:, :, None] >= k_at[:, None])
        found = found.masked_fill(~seen[:, None], float("-inf"))
    return found.repeat(1, 1, n_queries // lists.block_q, 1)
