"""Shapes of block-sparse prefill besides its cases: gated keys, heads of 256, sequences one behind another."""

import torch

from prunekit_kernels.block_sparse_prefill import cases

# Cases of block-sparse prefill with a gate on every key, and how many keys behind a query are free of it.
GATED = (
    (cases.Case(2, 4, 2, 63, 63, 64, block_q=32, block_k=32), 0),
    (cases.Case(1, 2, 1, 37, 100, 80, per_head=True, block_q=32, block_k=32), 9),
    (cases.Case(2, 2, 1, 90, 90, 64, spans=True, block_q=32, block_k=32), 5),
    (cases.Case(1, 2, 2, 70, 70, 64, causal=False, table=True, block_q=32, block_k=32), 0),
)
LARGE_GATED = (
    *((cases.Case(2, 8, 2, 1000, 1000, dim), 128) for dim in (64, 128, 256)),
    (cases.Case(1, 4, 1, 200, 1111, 128, per_head=True), 0),
    (cases.Case(3, 4, 2, 1000, 1000, 128, spans=True), 64),
)
WIDE = (
    cases.Case(1, 2, 1, 70, 70, 256, block_q=32, block_k=32),
    cases.Case(1, 2, 2, 37, 64, 256, per_head=True, block_q=32, block_k=32),
)
VARLEN = (33, 1, 64, 20)


def gates_of(case, seed=0):
    """Random gates [B, G, T], some of them closed; no query loses the last key that it reads."""
    draw = torch.Generator().manual_seed(seed)
    gates = torch.randn(case.batch, case.kv_heads, case.keys, generator=draw)
    closed = torch.rand(gates.shape, generator=draw) < 0.2
    return gates.masked_fill(closed, float("-inf"))


def varlen_inputs(dtype, device, block, dim=64, lengths=VARLEN, heads=4, kv_heads=2):
    """Sequences one behind another: queries, keys, values, starts, ends, and lists for the longest."""
    case = cases.Case(1, heads, kv_heads, max(lengths), max(lengths), dim, block_q=block, block_k=block)
    lists = cases.make(case, dtype, device, seed=3)[3]
    draw = torch.Generator().manual_seed(4)
    total = sum(lengths)
    q, k, v = (torch.randn(1, total, h, dim, generator=draw).to(dtype) for h in (heads, kv_heads, kv_heads))
    ends = torch.tensor(lengths).cumsum(0).to(device, torch.int32)
    starts = ends - torch.tensor(lengths, dtype=torch.int32, device=device)
    return *(t.to(device).transpose(1, 2) for t in (q, k, v)), starts, ends, lists
