"""Copies the cached tokens that lists name into a cache that holds nothing else, ragged by head, in pages."""

from prunekit_kernels.cache_compact.op import Compact, cache_compact

__all__ = ["Compact", "cache_compact"]
