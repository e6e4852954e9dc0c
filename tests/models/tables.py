"""Small embedding collections and ids for the tests of the heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

NUM_ROWS = 20


def embedding_bags(dims: list[int]) -> EmbeddingBagCollection:
    """One table of 20 rows a feature ``f0``, ``f1``, ... of the given widths."""
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=f"t{i}", embedding_dim=dim, num_embeddings=NUM_ROWS, feature_names=[f"f{i}"])
            for i, dim in enumerate(dims)
        ]
    )


def single_ids(num_features: int, batch_size: int, seed: int = 0) -> KeyedJaggedTensor:
    """One id a sample and feature."""
    generator = torch.Generator().manual_seed(seed)
    count = num_features * batch_size
    return KeyedJaggedTensor(
        keys=[f"f{i}" for i in range(num_features)],
        values=torch.randint(0, NUM_ROWS, (count,), generator=generator),
        lengths=torch.ones(count, dtype=torch.int32),
    )


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
