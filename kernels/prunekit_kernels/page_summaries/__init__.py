"""What a page or block of keys looks like from outside: bounds of its values, what they promise, or its mean."""

from prunekit_kernels.page_summaries.kept import KeptPages
from prunekit_kernels.page_summaries.op import block_means, can_renew, page_bounds, page_scores, renew_pages

__all__ = ["KeptPages", "block_means", "can_renew", "page_bounds", "page_scores", "renew_pages"]
