"""Torch's attention kernels that are timed beside ours, and their masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from prunekit.runtime.attention.patterns.power import Power
from prunekit_kernels.block_sparse_prefill import BlockLists

BACKENDS = {"dense cudnn": SDPBackend.CUDNN_ATTENTION, "dense flash2": SDPBackend.FLASH_ATTENTION}


def compiled_flex(mode: str | None = None) -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False, mode=mode)


def power_rule(pattern: Power) -> Callable[..., Tensor]:
    size, near, sink = pattern.block_tokens, pattern.window_blocks, pattern.sink_blocks

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        d = q // size - k // size
        return ((d < near) | ((d & (d - 1)) == 0) | (k // size < sink)) & (k <= q)

    return rule


def tile_rule(sizes: tuple[int, ...], window: tuple[int, ...], tile: tuple[int, ...]) -> Callable[..., Tensor]:
    """A neighbourhood of slots in the order of tiles, without dilation or stride, for tiles that fit the grid.

    Coordinates come by arithmetic, which costs FlexAttention less than asking a tensor for them.
    """

    def coordinates(slot: Tensor) -> list[Tensor]:
        number, inner, found = slot // 128, slot % 128, []
        for size, t in zip(reversed(sizes), reversed(tile), strict=True):
            found.append(number % (size // t) * t + inner % t)
            number, inner = number // (size // t), inner // t
        return found[::-1]

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = q >= 0
        for i, j, size, w in zip(coordinates(q), coordinates(k), sizes, window, strict=True):
            right = w // 2 + w % 2 - 1
            first = (i - w // 2).clamp(min=0) - (i + right - (size - 1)).clamp(min=0)
            seen = seen & (j >= first) & (j < first + w)
        return seen

    return rule


def flex_mask(lists: BlockLists, rule: Callable[..., Tensor]) -> BlockMask:
    """Our lists as FlexAttention's, which keeps full and masked blocks apart."""
    counts, partials, indices = (t[0].long() for t in (lists.counts, lists.partials, lists.indices))
    slot = torch.arange(indices.shape[1], device=indices.device)

    def packed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        cells = torch.zeros(len(indices), -(-lists.n_keys // lists.block_k), dtype=torch.int64, device=indices.device)
        row, at = chosen.nonzero(as_tuple=True)
        cells[row, indices[row, at]] = 1
        order = torch.argsort(cells, dim=1, descending=True, stable=True)
        return cells.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]

    masked = slot < partials[:, None]
    full = (slot < counts[:, None]) & ~masked
    return BlockMask.from_kv_blocks(*packed(masked), *packed(full), BLOCK_SIZE=lists.block_k, mask_mod=rule)


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Callable[[], Tensor]:
    """Attention to everything through one backend of torch."""

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return run
