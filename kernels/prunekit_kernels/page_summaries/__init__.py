"""What a page or block of keys looks like from outside: bounds of its values, what they promise, or its mean."""

from prunekit_kernels.page_summaries.op import block_means, page_bounds, page_scores

__all__ = ["block_means", "page_bounds", "page_scores"]
