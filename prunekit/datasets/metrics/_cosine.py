"""Cosines of embeddings."""

from __future__ import annotations

import numpy as np


def unit_length(block: np.ndarray) -> np.ndarray:
    """Rows brought to length 1, float32 [rows, d]; rows of zeros stay."""
    length = np.linalg.norm(block, axis=1, keepdims=True)
    return (block / np.maximum(length, 1e-12)).astype(np.float32)


def cosine_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - cos of each pair of rows, float32 [rows] in [0, 2]; 1 where a row is zero."""
    return (1.0 - (unit_length(a) * unit_length(b)).sum(1)).clip(0.0, 2.0).astype(np.float32)
