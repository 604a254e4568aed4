"""Text to run a model on, and what is measured inside the model while it runs."""
