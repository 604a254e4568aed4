"""What a model is worth before and after a cut: perplexity, likeness of outputs, speed, memory, a sample."""
