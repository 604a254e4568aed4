"""What a page or block of keys looks like from outside: its smallest and largest values, or its mean; and what they promise a query."""

from prunekit_kernels.page_summaries.op import block_means, page_bounds, page_scores

__all__ = ["block_means", "page_bounds", "page_scores"]
