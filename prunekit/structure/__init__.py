"""What a checkpoint is made of: which tensors form a sub-layer and which of their dimensions are cut together."""
