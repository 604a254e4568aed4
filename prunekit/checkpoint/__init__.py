"""Checkpoints on disk: where they come from, reading them lazily, writing them in shards."""
