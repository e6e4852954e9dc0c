"""A method's batch against its definition, written for one id in plain Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.method import CompressedTables
from tests.embedding_cases import KEYS, bags, pool_plainly


def group_of(collection: CompressedEmbeddingBagCollection) -> CompressedTables:
    [group] = collection.groups
    assert isinstance(group, CompressedTables)
    return group


def rows_of(method: CompressedTables, lookup: int = 0, table: int = 0) -> Tensor:
    """The weight of one physical table, detached."""
    name = method.physical_tables[lookup][table].name
    return method.get_parameter(f"lookups.{lookup}.embedding_bags.{name}.weight").detach()


def check_batch(
    collection: CompressedEmbeddingBagCollection,
    vector: Callable[[EmbeddingBagConfig, int], Tensor],
    ids: list[list[list[int]]],
) -> None:
    """Every bag equals the sum or mean of ``vector(table, id)`` over its ids."""
    tables = collection.embedding_bag_configs()
    owners = {name: table for table in tables for name in table.feature_names}
    vectors = {
        key: {value: vector(owners[key], value) for value in {0, *(i for bag in feature for i in bag)}}
        for key, feature in zip(KEYS, ids, strict=True)
    }
    means = [owners[key].pooling == PoolingType.MEAN for key in KEYS]
    output = collection(bags(KEYS, ids))
    columns = torch.cat([output[key] for key in KEYS], dim=1)
    torch.testing.assert_close(columns, pool_plainly(vectors, ids, means), rtol=1e-5, atol=1e-6)


def all_vectors(collection: CompressedEmbeddingBagCollection, feature: str, num_ids: int) -> Tensor:
    """(num_ids, D) vectors of ids 0 .. num_ids - 1 of one feature, detached; other bags are empty."""
    keys = [name for table in collection.embedding_bag_configs() for name in table.feature_names]
    lengths = torch.stack([torch.full((num_ids,), int(key == feature)) for key in keys]).view(-1)
    return collection(KeyedJaggedTensor(keys, torch.arange(num_ids), lengths=lengths))[feature].detach()
