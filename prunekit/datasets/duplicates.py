"""Near duplicates: examples whose embeddings point almost the same way.

Source: SemDeDup, https://arxiv.org/abs/2303.09540, for the search inside clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prunekit.datasets.arrays import read_rows
from prunekit.datasets.clusters import fit, nearest

# Up to here all pairs are compared; beyond, those inside a cluster, and pairs across clusters are missed.
EXACT = 20_000
_ROWS = 512


def without_near_duplicates(
    file: Path, order: np.ndarray, cosine: float, seed: int = 0, exact: int = EXACT
) -> np.ndarray:
    """`order` without the examples that are nearer than `cosine` to one before them.

    Args:
        file: embeddings, float32 [n, d].
        order: positions, best first: of near duplicates the best stays.
        cosine: above this, two examples are near duplicates.
        seed: of k-means.
        exact: size up to which all pairs are compared.
    """
    n, d = np.load(file, mmap_mode="r").shape
    if n <= exact:
        vectors = np.concatenate([block for _, block in _unit_blocks(file)])
        return order[_kept(vectors[order], cosine)]
    made = fit(lambda: _unit_blocks(file), n, d, -(-n // (exact // 10)), seed)
    cluster = np.empty(n, np.int64)
    for first, block in _unit_blocks(file):
        cluster[first : first + len(block)] = nearest(block, made.centroids)
    kept = np.zeros(len(order), bool)
    stored = np.load(file, mmap_mode="r")
    for number in range(len(made.centroids)):
        places = np.flatnonzero(cluster[order] == number)
        kept[places] = _kept(_unit(np.array(stored[order[places]])), cosine)
    return order[kept]


def _kept(vectors: np.ndarray, cosine: float) -> np.ndarray:
    """Which rows stay when each goes that is too near to an earlier one that stays, bool [n]."""
    kept = np.zeros(len(vectors), bool)
    for first in range(0, len(vectors), _ROWS):
        block = vectors[first : first + _ROWS]
        near = np.zeros(len(block), bool)
        if first:
            near = (block @ vectors[:first][kept[:first]].T > cosine).any(1)
        among = block @ block.T > cosine
        for row in range(len(block)):
            near[row] |= bool((among[row, :row] & ~near[:row]).any())
        kept[first : first + len(block)] = ~near
    return kept


def _unit(block: np.ndarray) -> np.ndarray:
    found: np.ndarray = block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
    return found


def _unit_blocks(file: Path) -> Iterator[tuple[int, np.ndarray]]:
    for first, block in read_rows(file):
        yield first, _unit(block)
