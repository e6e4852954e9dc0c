"""Tables of Criteo's shape with any number of ids in all, and ids as popular as Criteo's.

Shapes: F 26 features, B batch.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from data_pipelines.synthetic_shape import CATEGORICAL, LARGEST_FLOOR, LARGEST_TOTAL_IDS, cardinalities


@functools.cache
def sizes(total_ids: int) -> tuple[int, ...]:
    """Ids of C1..C26: those of the synthetic log, whose large columns grow on by one factor beyond its limit.

    Args:
        total_ids: of all columns, from 2,000.
    """
    known = tuple(cardinalities(min(total_ids, LARGEST_TOTAL_IDS)).values())
    if total_ids <= LARGEST_TOTAL_IDS:
        return known
    small = sum(size for size in known if size <= LARGEST_FLOOR)
    factor = (total_ids - small) / (sum(known) - small)
    grown = [size if size <= LARGEST_FLOOR else round(size * factor) for size in known]
    grown[grown.index(max(grown))] += total_ids - sum(grown)
    return tuple(grown)


def tables(total_ids: int, dim: int) -> list[EmbeddingBagConfig]:
    """The 26 logical tables."""
    return [
        EmbeddingBagConfig(name=f"t_{shape.name}", num_embeddings=size, embedding_dim=dim, feature_names=[shape.name])
        for shape, size in zip(CATEGORICAL, sizes(total_ids), strict=True)
    ]


def draw(generator: np.random.Generator, total_ids: int, batch_size: int) -> Tensor:
    """(F, B) int64 ids in order of frequency, as recemb's pipelines number them: rank k of a column has the mass of
    ``x ** -exponent`` on [k + offset, k + offset + 1)."""
    columns = []
    for shape, size in zip(CATEGORICAL, sizes(total_ids), strict=True):
        power = 1 - shape.exponent
        first, last = shape.offset**power, (size + shape.offset) ** power
        positions = (first + generator.random(batch_size) * (last - first)) ** (1 / power)
        columns.append(np.clip((positions - shape.offset).astype(np.int64), 0, size - 1))
    return torch.from_numpy(np.stack(columns))


def scatter(ids_FB: Tensor, total_ids: int) -> Tensor:
    """The same ids in an order that has nothing to do with frequency, as hashed vocabularies number them."""
    scattered = []
    for row, size in zip(ids_FB, sizes(total_ids), strict=True):
        # A multiplier coprime to the size makes a permutation; below 2**31 its products fit int64.
        multiplier = max(1, int(0.618 * min(size, 2**31)))
        while math.gcd(multiplier, size) > 1:
            multiplier -= 1
        scattered.append(row * multiplier % size)
    return torch.stack(scattered)
