"""Block-sparse prefill by flash-attn-4, where that package is installed: a peer of the kernels here."""

# mypy: ignore-errors
from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from prunekit_kernels._device import HALF
from prunekit_kernels.block_sparse_prefill.lists import BlockLists

NAME = "flash-attn-4"
HEAD_SIZES = (64, 128)


@functools.cache
def _installed() -> bool:
    found = (importlib.util.find_spec(name) is not None for name in ("flash_attn", "cutlass"))
    return all(found) and importlib.util.find_spec("flash_attn.cute") is not None


def refusal(q: Tensor, k: Tensor, lists: BlockLists) -> str:
    """Why it does not take the case, or an empty string if it does."""
    if not q.is_cuda:
        return f"the tensors are on `{q.device.type}`"
    return case_refusal(q, k, lists) or ("" if _installed() else "flash_attn.cute is not installed")


def case_refusal(q: Tensor, k: Tensor, lists: BlockLists) -> str:
    """The same without looking at the device or at what is installed."""
    if q.dtype not in HALF or q.shape[-1] not in HEAD_SIZES:
        return f"dtype {q.dtype} or head size {q.shape[-1]}"
    if (lists.block_q, lists.block_k) != (128, 128) or lists.masks is not None or lists.biases is not None:
        return "the lists are not plain blocks of 128"
    if not lists.causal or lists.q_offset or q.shape[2] != k.shape[2] or lists.shortest < 1:
        return "it is no whole causal prompt"
    if any(tensor.requires_grad for tensor in (q, k)) and torch.is_grad_enabled():
        return "gradients are asked for"
    return ""


def run(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float) -> Tensor:
    """Output [B, H, S, D]; causality is masked in the partial blocks alone."""
    return prepared(q, k, v, lists, scale)()


def prepared(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float) -> Callable[[], Tensor]:
    """What `run` does once lists and layouts are as the package takes them."""
    import cutlass.cute as cute
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    partials, full = lists.partials[None], (lists.counts - lists.partials)[None]
    width = lists.indices.shape[-1]
    # Full blocks stand behind the partial ones.
    rest = (partials[..., None] + torch.arange(width, device=q.device)).clamp(max=width - 1).long()
    sparse = BlockSparseTensorsTorch(
        partials.contiguous(), lists.indices[None].contiguous(), full.contiguous(),
        lists.indices[None].gather(-1, rest).contiguous(), block_size=(128, 128),
    )  # fmt: skip
    mine = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    causal = _causal(cute.jit)

    def call() -> Tensor:
        out = flash_attn_func(*mine, softmax_scale=scale, mask_mod=causal, block_sparse_tensors=sparse)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


@functools.cache
def _causal(jit):
    """The mask inside partial blocks, compiled once."""

    @jit
    def causal(batch, head, q_at, k_at, seqlen_info, aux_tensors):
        return q_at >= k_at

    return causal
