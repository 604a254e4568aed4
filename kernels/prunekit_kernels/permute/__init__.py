"""Tokens in another order, for patterns whose blocks are not runs of tokens."""

from prunekit_kernels.permute.op import permute_tokens

__all__ = ["permute_tokens"]
