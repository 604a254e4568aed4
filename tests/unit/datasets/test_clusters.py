"""k-means by every engine, on blocks of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Literal

import numpy as np
import pytest

from prunekit.core.errors import UsageError
from prunekit.datasets.clusters import fit, nearest
from prunekit.datasets.duplicates import without_near_duplicates

pytest.importorskip("sklearn")
RNG = np.random.default_rng(0)
CENTRES = 8 * np.eye(6, dtype=np.float32)[:4]
# Sorted by cluster: the hardest order for minibatches.
POINTS = (np.repeat(CENTRES, 500, axis=0) + 0.3 * RNG.normal(size=(2000, 6))).astype(np.float32)


def blocks() -> Iterator[tuple[int, np.ndarray]]:
    for first in range(0, len(POINTS), 64):
        yield first, POINTS[first : first + 64]


@pytest.mark.parametrize("engine", ["faiss", "scikit-learn"])
def test_every_engine_finds_separate_clusters(engine: Literal["faiss", "scikit-learn"]) -> None:
    if engine == "faiss" and not find_spec("faiss"):
        pytest.skip("faiss is not installed")
    # About one seed in a hundred draws two beginnings in one cluster.
    found = fit(blocks, 2000, 6, 4, seed=1, engine=engine)
    assert found.engine == engine
    assert np.linalg.norm(found.centroids[nearest(CENTRES, found.centroids)] - CENTRES, axis=1).max() < 0.2


def test_minibatches_of_a_sorted_stream_find_the_clusters() -> None:
    wide = np.concatenate([POINTS, np.zeros((2000, 1018), np.float32)], axis=1)

    def stream() -> Iterator[tuple[int, np.ndarray]]:
        for first in range(0, len(wide), 64):
            yield first, wide[first : first + 64]

    found = fit(stream, 2000, 1024, 4, memory_mib=1, engine="scikit-learn")
    assert found.engine == "scikit-learn minibatch"
    assert np.linalg.norm(found.centroids[nearest(wide[::500], found.centroids)][:, :6] - CENTRES, axis=1).max() < 0.3


def test_more_clusters_than_a_block_has_rows() -> None:
    assert fit(blocks, 2000, 6, 100, memory_mib=0, engine="scikit-learn").centroids.shape == (100, 6)


def test_more_clusters_than_points_is_an_error() -> None:
    with pytest.raises(UsageError, match="2000 examples cannot make 2001 clusters"):
        fit(blocks, 2000, 6, 2001)


def test_nearest_is_the_closest_centroid() -> None:
    centroids = RNG.normal(size=(7, 6)).astype(np.float32)
    expected = np.linalg.norm(POINTS[:, None] - centroids, axis=2).argmin(1)
    assert np.array_equal(nearest(POINTS, centroids), expected)


@pytest.mark.parametrize("exact", [2000, 100], ids=["all pairs", "inside clusters"])
def test_of_near_duplicates_the_best_stays(exact: int, tmp_path) -> None:
    vectors = RNG.normal(size=(400, 32)).astype(np.float32)
    copies = vectors[:50] * 2 + 1e-3
    np.save(tmp_path / "e.npy", np.concatenate([vectors, copies]))
    order = RNG.permutation(450)
    kept = without_near_duplicates(tmp_path / "e.npy", order, 0.99, exact=exact)
    place = np.argsort(order)
    gone = {i if place[i] > place[400 + i] else 400 + i for i in range(50)}
    assert set(order.tolist()) - set(kept.tolist()) == gone
    assert kept.tolist() == [i for i in order.tolist() if i not in gone]


def test_a_chain_of_duplicates_loses_only_what_is_near_to_a_kept_one(tmp_path) -> None:
    angles = np.deg2rad([0, 10, 20, 90])
    np.save(tmp_path / "e.npy", np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    assert without_near_duplicates(tmp_path / "e.npy", np.arange(4), np.cos(np.deg2rad(15))).tolist() == [0, 2, 3]
