"""Lloyd's k-means on tensors of any device, in bounded memory and without a state of its own.

Shapes: N vectors, K clusters, W dimensions.
"""

from __future__ import annotations

import torch
from scipy.spatial import KDTree
from torch import Tensor

# Distances held at once, in floats: as many as stay in the cache.
_BLOCK_DISTANCES = 1 << 18


def k_means(vectors_NW: Tensor, num_clusters: int, generator: torch.Generator, *, iterations: int = 25) -> Tensor:
    """Centroids (K, W) of the vectors, from random distinct ones of them as a start.

    A cluster that loses all its vectors moves to the vector that fits its centroid worst.

    Args:
        vectors_NW: at least K of them.
        num_clusters: K.
        generator: of the CPU; draws the start.
        iterations: at most; fewer where nothing moves any more. 25 is the usual choice for codebooks.

    Raises:
        ValueError: fewer vectors than clusters.
    """
    if not 1 <= num_clusters <= len(vectors_NW):
        raise ValueError(f"num_clusters must be in [1, {len(vectors_NW)}] (vectors), got {num_clusters}")
    start = torch.randperm(len(vectors_NW), generator=generator)[:num_clusters]
    centroids = vectors_NW[start.to(vectors_NW.device)].clone()
    previous: Tensor | None = None
    for _ in range(iterations):
        assigned, distances = nearest(vectors_NW, centroids)
        if previous is not None and torch.equal(assigned, previous):
            break
        previous = assigned
        counts = torch.bincount(assigned, minlength=num_clusters)
        sums = torch.zeros_like(centroids).index_add_(0, assigned, vectors_NW)
        centroids = sums / counts.clamp(min=1).unsqueeze(1)
        empty = (counts == 0).nonzero().view(-1)
        if len(empty):
            centroids[empty] = vectors_NW[distances.topk(len(empty)).indices]
    return centroids


@torch.no_grad()
def nearest(vectors_NW: Tensor, centroids_KW: Tensor) -> tuple[Tensor, Tensor]:
    """For every vector the nearest centroid: (N,) int64 its number, (N,) squared distance.

    On CPU a k-d tree finds it where that takes less time than all distances: from 1,024 centroids of 4 dimensions on,
    and four times as many for each dimension more.

    Raises:
        ValueError: vectors that are not finite, where a tree is asked.
    """
    if vectors_NW.device.type == "cpu" and len(centroids_KW) >= 4 ** (centroids_KW.shape[1] + 1):
        # Without balance, which takes as long to make as some thousand queries and saves none.
        tree = KDTree(centroids_KW.numpy(), balanced_tree=False, compact_nodes=False)
        found, numbers = tree.query(vectors_NW.numpy(), workers=torch.get_num_threads())
        return torch.from_numpy(numbers), torch.from_numpy(found).square().to(vectors_NW.dtype)
    squares = centroids_KW.square().sum(dim=1)
    scaled = -2 * centroids_KW.t()
    best, least = [], []
    for block in vectors_NW.split(max(1, _BLOCK_DISTANCES // len(centroids_KW))):
        # Without the vector's own square, which is the same for every centroid.
        distances = torch.addmm(squares, block, scaled)
        # On CPU numpy's argmin is vectorised, torch's is not.
        on_cpu = distances.device.type == "cpu"
        indices = torch.from_numpy(distances.numpy().argmin(axis=1)) if on_cpu else distances.argmin(dim=1)
        best.append(indices)
        least.append(distances.gather(1, indices.unsqueeze(1)).squeeze(1) + block.square().sum(dim=1))
    if not best:
        return vectors_NW.new_zeros(0, dtype=torch.int64), vectors_NW.new_zeros(0)
    return torch.cat(best), torch.cat(least)
