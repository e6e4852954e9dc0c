"""k-means against scikit-learn from the same start, and where clusters run empty."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from recemb.k_means import k_means, nearest


def test_centroids_equal_scikit_learns_from_the_same_start() -> None:
    vectors = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    start = vectors[torch.randperm(400, generator=torch.Generator().manual_seed(7))[:9]]
    reference = KMeans(9, init=start.numpy(), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(vectors.numpy())
    ours = k_means(vectors, 9, torch.Generator().manual_seed(7), iterations=300)
    np.testing.assert_allclose(ours.numpy(), reference.cluster_centers_, rtol=1e-4, atol=1e-5)


def test_a_cluster_without_vectors_moves_to_the_worst_fitting_one() -> None:
    # Whatever the start, two of three centroids begin on equal points, and the outlier needs one of its own.
    vectors = torch.tensor([[0.0, 0.0]] * 20 + [[1.0, 1.0]] * 20 + [[9.0, 9.0]])
    for seed in range(10):
        centroids = k_means(vectors, 3, torch.Generator().manual_seed(seed))
        assert sorted(centroids[:, 0].tolist()) == [0.0, 1.0, 9.0]


def test_nearest_is_the_smallest_distance_in_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recemb.k_means._BLOCK_DISTANCES", 50)
    vectors, centroids = torch.randn(100, 3), torch.randn(7, 3)
    assigned, squares = nearest(vectors, centroids)
    distances = torch.cdist(vectors, centroids)
    assert torch.equal(assigned, distances.argmin(dim=1))
    torch.testing.assert_close(squares, distances.min(dim=1).values.square(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_centroids", [1023, 1024, 3000])
def test_nearest_of_many_centroids_is_the_smallest_distance(num_centroids: int) -> None:
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randn(num_centroids, 4, generator=generator)
    # Of equal ones any may be the nearest.
    centroids[:100] = centroids[100]
    vectors = torch.cat([torch.randn(5000, 4, generator=generator), centroids[90:200]])
    assigned, squares = nearest(vectors, centroids)
    distances = torch.cdist(vectors.double(), centroids.double())
    least = distances.min(dim=1).values
    torch.testing.assert_close(distances.gather(1, assigned.unsqueeze(1)).squeeze(1), least, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(squares.double(), least.square(), rtol=1e-4, atol=1e-5)
    assert assigned.dtype == torch.int64 and squares.dtype == torch.float32
    empty = nearest(vectors[:0], centroids)
    assert [(part.numel(), part.dtype) for part in empty] == [(0, torch.int64), (0, torch.float32)]


def test_as_many_clusters_as_vectors_reproduce_them() -> None:
    vectors = torch.randn(5, 2)
    centroids = k_means(vectors, 5, torch.Generator())
    assert {tuple(row) for row in centroids.tolist()} == {tuple(row) for row in vectors.tolist()}


def test_fewer_vectors_than_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_clusters must be in \[1, 3\] \(vectors\), got 4"):
        k_means(torch.zeros(3, 2), 4, torch.Generator())
