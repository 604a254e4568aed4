"""Shapes and tolerances of block-sparse prefill, shared by tests and benchmark."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit_kernels.block_sparse_prefill.lists import BlockLists, pack_bits

# Relative error of the output against float64: float32 sums of a few thousand terms; one rounding of the weights and
# of the result to 8 or 11 bits. The log-sum-exp is float32 in every kernel.
RELATIVE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LSE_ABSOLUTE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Case:
    """One shape. `lists`: how block lists look inside; `spans`: sequences padded on both sides."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    causal: bool = True
    per_head: bool = False
    table: bool = False
    spans: bool = False
    block_q: int = 128
    block_k: int = 128

    @property
    def name(self) -> str:
        """Shape and kind in one word, for test ids and benchmark rows."""
        kinds = (
            "causal" if self.causal else "full",
            "perhead" * self.per_head,
            "table" * self.table,
            "spans" * self.spans,
        )
        shape = f"B{self.batch}-H{self.heads}-G{self.kv_heads}-S{self.queries}-T{self.keys}-D{self.dim}"
        return "-".join((shape, *(kind for kind in kinds if kind), f"{self.block_q}x{self.block_k}"))


# Small enough for an interpreter: 32 by 32 blocks, ragged everywhere.
SMALL = (
    Case(2, 4, 2, 63, 63, 64, block_q=32, block_k=32),
    Case(1, 2, 2, 100, 100, 80, causal=False, block_q=32, block_k=32),
    Case(1, 4, 1, 37, 100, 96, per_head=True, block_q=32, block_k=32),
    Case(1, 2, 1, 70, 70, 128, table=True, block_q=32, block_k=64),
    Case(2, 2, 1, 90, 90, 64, spans=True, per_head=True, block_q=32, block_k=32),
    Case(2, 2, 2, 65, 65, 64, spans=True, causal=False, table=True, block_q=32, block_k=32),
)
# For a GPU: the block sizes people use, ragged lengths.
LARGE = (
    *(
        Case(batch, heads, kv_heads, queries, keys, dim, causal=causal, per_head=per_head)
        for batch, heads, kv_heads, queries, keys in (
            (1, 2, 1, 63, 63),
            (2, 4, 2, 100, 100),
            (1, 8, 2, 1000, 1000),
            (2, 4, 4, 4097, 4097),
            (1, 4, 1, 200, 1111),
        )
        for dim in (64, 128)
        for causal, per_head in ((True, False), (False, False), (True, True))
    ),
    Case(2, 4, 2, 1000, 1000, 80),
    Case(2, 4, 2, 1000, 1000, 96, causal=False),
    Case(2, 4, 2, 1000, 1000, 256),
    Case(2, 4, 2, 1000, 1000, 128, table=True),
    Case(3, 4, 2, 1000, 1000, 128, spans=True),
    Case(2, 4, 2, 700, 700, 64, spans=True, table=True, causal=False),
)


def lists_of(mask: Tensor, case: Case) -> BlockLists:
    """Block lists of a dense bool mask [1 or H, S, T]; masks inside blocks go to the table if the case wants one."""
    heads, queries, keys = mask.shape
    n_rows, n_cols = -(-queries // case.block_q), -(-keys // case.block_k)
    padded = torch.zeros(heads, n_rows * case.block_q, n_cols * case.block_k, dtype=torch.bool)
    padded[:, :queries, :keys] = mask
    cells = padded.view(heads, n_rows, case.block_q, n_cols, case.block_k).transpose(2, 3)
    real = torch.zeros(n_rows * case.block_q, dtype=torch.bool)
    real[:queries] = True
    full = (cells | ~real.view(n_rows, 1, case.block_q, 1)).flatten(3).all(-1)
    partial = cells.flatten(3).any(-1) & ~full
    counts, partials = (full | partial).sum(-1), partial.sum(-1)
    indices = torch.argsort((full * 1 + partial * 2).flip(-1), dim=-1, descending=True, stable=True)
    indices = (n_cols - 1 - indices)[..., : max(1, int(counts.max()))].to(torch.int32)
    masks = mask_ids = None
    if case.table:
        head, row = torch.arange(heads)[:, None, None], torch.arange(n_rows)[None, :, None]
        listed = indices[..., : max(1, int(partials.max()))].long()
        masks = pack_bits(cells[head, row, listed].flatten(0, 2))
        mask_ids = torch.arange(len(masks), dtype=torch.int32).view(heads, n_rows, -1)
    return BlockLists(
        counts=counts.to(torch.int32), partials=partials.to(torch.int32), indices=indices.contiguous(),
        mask_ids=mask_ids, masks=masks, block_q=case.block_q, block_k=case.block_k, n_queries=queries, n_keys=keys,
        q_offset=keys - queries, causal=case.causal, pairs=int(mask.sum()), shortest=int(counts.min()),
    )  # fmt: skip


def make(
    case: Case, dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, Tensor, Tensor, BlockLists, Tensor | None, Tensor | None]:
    """Random queries, keys, values and lists, and sequence starts and ends if the case has them."""
    random = torch.Generator().manual_seed(seed)
    lists_heads = case.heads if case.per_head else 1
    rows, cols = -(-case.queries // case.block_q), -(-case.keys // case.block_k)
    q_at = torch.arange(case.queries)[:, None] + case.keys - case.queries
    k_at = torch.arange(case.keys)[None, :]
    blocks = torch.rand(lists_heads, rows, cols, generator=random) < 0.4
    mask = blocks.repeat_interleave(case.block_q, 1)[:, : case.queries]
    mask = mask.repeat_interleave(case.block_k, 2)[:, :, : case.keys]
    # The blocks that touch the diagonal, as every pattern has them: no query is left without a key.
    mask = mask | (q_at // case.block_k == k_at // case.block_k)
    near = (torch.arange(rows) * case.block_q + case.keys - case.queries) // case.block_k
    mask = mask | (k_at // case.block_k == near.repeat_interleave(case.block_q)[: case.queries, None])
    if case.table:
        mask = mask & (torch.rand(mask.shape, generator=random) < 0.7)
        mask = mask | (q_at == k_at)
    if case.causal:
        mask = mask & (k_at <= q_at)

    def draw(heads: int, tokens: int) -> Tensor:
        # Stored [B, tokens, heads, D] and transposed, as models hand them over.
        data = torch.randn(case.batch, tokens, heads, case.dim, generator=random).to(dtype)
        return data.to(device).transpose(1, 2)

    q, k, v = draw(case.heads, case.queries), draw(case.kv_heads, case.keys), draw(case.kv_heads, case.keys)
    starts = ends = None
    if case.spans:
        cuts = torch.randint(0, case.queries // 3, (2, case.batch), generator=random)
        starts = cuts[0].to(device, torch.int32)
        ends = (case.queries - cuts[1]).to(device, torch.int32)
    return q, k, v, lists_of(mask, case).to(device), starts, ends


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; zero for zeros, NaN stays NaN."""
    return float((out.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
