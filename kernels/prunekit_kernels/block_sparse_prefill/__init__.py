"""Attention over lists of key blocks, for prompts: the kernel behind every pattern that thinks in blocks."""

from prunekit_kernels.block_sparse_prefill.lists import BlockLists
from prunekit_kernels.block_sparse_prefill.op import block_sparse_prefill, refusal

__all__ = ["BlockLists", "block_sparse_prefill", "refusal"]
