"""Our prefill kernels with launches of their own, and random prompts for them, in the heads of Llama-3-8B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prunekit.runtime.attention.patterns.power import Power
from prunekit_kernels.block_sparse_prefill import BlockLists, portable
from prunekit_kernels.block_sparse_prefill.reference import masked_attention

HEADS, KV_HEADS, DIM, SCALE = 32, 8, 128, 128**-0.5
POWER = Power(block_tokens=128, window_blocks=8, sink_blocks=1)
# Queries, keys, values and lists, perhaps starts and ends of sequences; output and log-sum-exps.
Prefill = Callable[..., tuple[Tensor, Tensor]]


def draw(n: int, heads: int = HEADS, kv_heads: int = KV_HEADS, on: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """Queries [1, heads, n, DIM], keys and values [1, kv_heads, n, DIM] of a prompt, bfloat16; the same for an `n`."""
    torch.manual_seed(n)
    q, k, v = (torch.randn(1, h, n, DIM, device=on, dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads))
    return q, k, v


def portable_with(tile: portable.Tile) -> Prefill:
    """The portable kernel with one tile."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, starts: Tensor | None = None, ends: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return portable.launch(q, k, v, *lists.tensors, starts, ends, *lists.numbers, q.shape[-1] ** -0.5, tile)

    return run


def hopper_with(**options: Any) -> Prefill:
    """The Hopper kernel with options of its launch, for whole prompts."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, starts: None = None, ends: None = None
    ) -> tuple[Tensor, Tensor]:
        from prunekit_kernels.block_sparse_prefill import hopper_launch

        return hopper_launch.launch(
            q, k, v, *lists.tensors, lists.q_offset, lists.causal, q.shape[-1] ** -0.5, **options
        )

    return run


def some_rows(
    q: Tensor, k: Tensor, v: Tensor, rule: Callable[[Tensor], Tensor], firsts: tuple[int, ...], size: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Runs of `size` queries of one long prompt with what attention gives them, in float32.

    Args:
        q: [1, H, n, D]; `k` and `v` [1, G, n, D].
        rule: of positions of queries, the mask [1 or H, rows, n].
        firsts: where the runs begin.
    Yields:
        The run, output [H, rows, D] and log-sum-exps [H, rows].
    """
    n, scale = q.shape[2], q.shape[-1] ** -0.5
    for first in firsts:
        run = slice(first, min(first + size, n))
        rows = torch.arange(n, device=q.device)[run]
        yield run, *masked_attention(q[0, :, run].float(), k[0].float(), v[0].float(), rule(rows), scale)
