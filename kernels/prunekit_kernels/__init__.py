"""GPU kernels of prunekit: one folder an operation, each with a plain reference, a kernel and shared cases.

Prompts and steps have paths for a CPU beside their references, `cpu.py`.

Importing this package or an operation needs torch alone; Triton is imported on the first launch on a GPU.
"""
