"""Data pruning: which training examples stay. One file a metric in `metrics/`; rules, embeddings and files here."""
