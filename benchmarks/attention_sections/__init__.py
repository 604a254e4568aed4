"""Sections of attention_suite.py, a file each: `run(bench)` checks kernels, then times them."""
