"""Models in memory: stock and heterogeneous classes, and loading a checkpoint folder into them."""
