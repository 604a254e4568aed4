"""Attention over two sets of keys as one, from the two results and their log-sum-exps."""

from prunekit_kernels.merge.op import merge_attention

__all__ = ["merge_attention"]
