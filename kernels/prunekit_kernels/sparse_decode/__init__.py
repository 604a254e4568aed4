"""Attention of one or a few new tokens over lists of cached pages or tokens: the decode kernel of every pattern."""

from prunekit_kernels.sparse_decode.lists import PageLists
from prunekit_kernels.sparse_decode.op import refusal, sparse_decode

__all__ = ["PageLists", "refusal", "sparse_decode"]
