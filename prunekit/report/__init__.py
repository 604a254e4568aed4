"""What a run shows: layer map, before/after table, structure table and model card."""
