"""Sparse attention: patterns say which keys a query reads, `interface` carries that out inside transformers."""
