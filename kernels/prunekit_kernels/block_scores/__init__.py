"""Which key blocks are worth reading: block scores from queries and keys, and lists of the best blocks."""

from prunekit_kernels.block_scores.op import antidiagonal_scores, refusal, scored_lists, select_blocks

__all__ = ["antidiagonal_scores", "refusal", "scored_lists", "select_blocks"]
