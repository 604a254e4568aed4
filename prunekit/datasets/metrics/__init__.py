"""How much an example is worth keeping: one file a metric, higher = keep (hard)."""
