"""What a page or block of keys looks like from outside: its smallest and largest values, or its mean."""

from prunekit_kernels.page_summaries.op import block_means, page_bounds

__all__ = ["block_means", "page_bounds"]
