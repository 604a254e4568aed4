"""Training after the cut: one loop on transformers' Trainer; in `methods/` what it trains for, one file a method."""
