"""What each key gets from the queries, without the attention matrix: for methods that keep tokens by past attention."""

from prunekit_kernels.column_stats.op import column_stats, refusal

__all__ = ["column_stats", "refusal"]
