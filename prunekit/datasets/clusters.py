"""k-means over embeddings that may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np

from prunekit.core.errors import UsageError

Blocks = Callable[[], Iterator[tuple[int, np.ndarray]]]
Engine = Literal["auto", "faiss", "scikit-learn"]
# What faiss takes of each cluster's points by itself too; more changes centroids little.
_POINTS_A_CLUSTER = 256


@dataclass(frozen=True)
class Clusters:
    """Centroids and how they were found.

    Args:
        centroids: float32 [k, d].
        engine: `faiss`, `scikit-learn` (all points) or `scikit-learn minibatch`.
        points: how many the fit looked at.
    """

    centroids: np.ndarray
    engine: str
    points: int


def fit(
    blocks: Blocks,
    n: int,
    d: int,
    k: int,
    seed: int = 0,
    iterations: int = 25,
    engine: Engine = "auto",
    memory_mib: int = 1024,
) -> Clusters:
    """k-means of `n` points in at most about `memory_mib`.

    faiss fits a sample drawn from the seed (at most 256 points a cluster); scikit-learn fits all points where they
    fit, and reads them block by block (MiniBatchKMeans) where they do not.

    Args:
        blocks: a new pass over float32 [rows, d] blocks with their positions.
        engine: `auto` takes faiss where it is installed.
        memory_mib: bound on the points held at once.
    Raises:
        UsageError: if there are fewer points than clusters, or the engine is not installed.
    """
    require_points(n, k)
    if engine == "auto":
        engine = "faiss" if find_spec("faiss") else "scikit-learn"
    module = {"faiss": "faiss", "scikit-learn": "sklearn"}[engine]
    if find_spec(module) is None:
        package = {"faiss": "faiss-cpu", "sklearn": "scikit-learn"}[module]
        raise UsageError(f"k-means needs {package}, which is not installed", hint="pip install 'prunekit[data]'")
    room = max(k, (memory_mib << 20) // (4 * d))
    if engine == "faiss":
        return _faiss(_sample(blocks, n, d, min(n, _POINTS_A_CLUSTER * k, room), seed), k, seed, iterations)
    if n <= room:
        return _scikit(_sample(blocks, n, d, n, seed), k, seed, iterations)
    return _minibatch(blocks, n, d, k, seed, room)


def require_points(n: int, k: int) -> None:
    """Raises `UsageError` where there are fewer points than clusters."""
    if n < k:
        raise UsageError(f"{n} examples cannot make {k} clusters", hint=f"--set clusters={max(1, n // 10)}")


def nearest(block: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Number of the centroid closest to each row, int64 [rows]."""
    distance = (centroids**2).sum(1) - 2.0 * (block @ centroids.T)
    found: np.ndarray = distance.argmin(1)
    return found


def _sample(blocks: Blocks, n: int, d: int, points: int, seed: int) -> np.ndarray:
    """`points` rows drawn without repeats, in order, float32 [points, d]."""
    wanted = np.arange(n) if points == n else np.sort(np.random.default_rng(seed).permutation(n)[:points])
    found = np.empty((points, d), np.float32)
    for first, block in blocks():
        low, high = np.searchsorted(wanted, (first, first + len(block)))
        found[low:high] = block[wanted[low:high] - first]
    return found


def _faiss(points: np.ndarray, k: int, seed: int, iterations: int) -> Clusters:
    import faiss

    # Random beginnings, faiss's default, often leave two clusters as one; older versions have no other.
    better = getattr(faiss, "ClusteringInitMethod_KMEANS_PLUS_PLUS", None)
    begin = {"nredo": 3} if better is None else {"init_method": better}
    kmeans = faiss.Kmeans(
        points.shape[1],
        k,
        niter=iterations,
        seed=seed,
        max_points_per_centroid=len(points),
        min_points_per_centroid=1,
        **begin,
    )
    kmeans.train(points)
    return Clusters(np.asarray(kmeans.centroids, np.float32), "faiss", len(points))


def _scikit(points: np.ndarray, k: int, seed: int, iterations: int) -> Clusters:
    from sklearn.cluster import KMeans

    found = KMeans(k, n_init=1, max_iter=iterations, random_state=seed, copy_x=False).fit(points)
    return Clusters(found.cluster_centers_.astype(np.float32), "scikit-learn", len(points))


def _minibatch(blocks: Blocks, n: int, d: int, k: int, seed: int, room: int) -> Clusters:
    """Two passes of MiniBatchKMeans, begun from a sample so that blocks in the order of their class do no harm."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    begin = _sample(blocks, n, d, max(k, min(n, room // 2, 20 * k)), seed)
    centres = KMeans(k, n_init=1, max_iter=5, random_state=seed, copy_x=False).fit(begin).cluster_centers_
    del begin
    found = MiniBatchKMeans(k, init=centres, n_init=1, random_state=seed, reassignment_ratio=0.0)
    for _ in range(2):
        for block in _at_least(k, blocks):
            found.partial_fit(block)
    return Clusters(found.cluster_centers_.astype(np.float32), "scikit-learn minibatch", n)


def _at_least(rows: int, blocks: Blocks) -> Iterator[np.ndarray]:
    """Blocks joined until each has `rows` rows; a shorter rest goes into the last one."""
    held: np.ndarray | None = None
    waiting: list[np.ndarray] = []
    for _, block in blocks():
        waiting.append(block)
        if sum(map(len, waiting)) >= rows:
            if held is not None:
                yield held
            held, waiting = np.concatenate(waiting), []
    rest = [part for part in (held, *waiting) if part is not None]
    if rest:
        yield np.concatenate(rest)
