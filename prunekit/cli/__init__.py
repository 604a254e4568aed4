"""The `prunekit` command: one file a verb."""
