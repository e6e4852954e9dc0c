"""Generated features: one for each row of an id, each the row itself."""

from __future__ import annotations

import pytest
import torch
from torchrec.models.dlrm import DLRM
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.generated_features import GeneratedFeatures
from recemb.method import CompressedTables
from tests.embedding_cases import KEYS, MULTI_HOT, SINGLE, bags, small_tables, table


def test_every_row_is_a_feature_of_its_own() -> None:
    collection = GeneratedFeatures(small_tables()[::-1], num_collisions=10)
    output = collection(bags(KEYS, SINGLE))
    assert output.keys() == [
        *["one", "site__0", "site__1", "target__0", "history__0", "target__1", "history__1", "ad__0", "ad__1"]
    ]
    [group] = [each for each in collection.modules() if isinstance(each, CompressedTables) and len(each.tables) == 3]
    remainders, quotients = (
        group.get_parameter(f"lookups.0.embedding_bags.partition_{j}.weight").detach() for j in (0, 1)
    )
    for key, feature, size, start, first in (
        ("site", 3, 50, 0, 0),
        ("target", 1, 600, 50, 10),
        ("history", 2, 600, 50, 10),
        ("ad", 0, 400, 650, 20),
    ):
        for row, [value] in enumerate(SINGLE[feature]):
            assert torch.equal(output[f"{key}__0"][row], remainders[start + value % size])
            assert torch.equal(output[f"{key}__1"][row], quotients[first + value // size])


def test_bags_are_pooled_row_by_row() -> None:
    collection = GeneratedFeatures(small_tables(), num_collisions=10, num_partitions=3)
    together = collection(bags(KEYS, MULTI_HOT))
    alone = [collection(bags(KEYS, [[[value]]] + [[[]]] * 4))["ad__2"] for value in MULTI_HOT[0][0]]
    torch.testing.assert_close(together["ad__2"][0], torch.stack(alone).sum(dim=0)[0])


def test_configs_describe_what_comes_out() -> None:
    collection = GeneratedFeatures(small_tables(), num_collisions=10, full_below_rows=600)
    configs = collection.embedding_bag_configs()
    assert [(config.name, config.num_embeddings) for config in configs] == [
        *[("t_ad__0", 400), ("t_ad__1", 10), ("t_item__0", 600), ("t_item__1", 10), ("t_site", 500), ("t_one", 1)]
    ]
    output = collection(bags(KEYS, MULTI_HOT))
    assert output.keys() == [name for config in configs for name in config.feature_names]
    assert output.values().shape == (3, 8 * len(output.keys()))
    rows = sum(parameter.numel() for parameter in collection.parameters()) // 8
    assert rows == sum(config.num_embeddings for config in configs)


def test_torchrecs_dlrm_is_built_from_it_and_trains() -> None:
    collection = GeneratedFeatures(small_tables(), num_collisions=10)
    model = DLRM(collection, dense_in_features=3, dense_arch_layer_sizes=[8], over_arch_layer_sizes=[4, 1])
    loss = model(torch.randn(3, 3), bags(KEYS, MULTI_HOT)).sum()
    loss.backward()
    # 9 generated features and the dense one: 45 dot products beside the dense vector.
    assert model.over_arch.model[0]._mlp[0]._linear.in_features == 8 + 45
    assert all(parameter.grad is not None for parameter in collection.parameters())


def test_without_full_tables_nothing_is_moved() -> None:
    collection = GeneratedFeatures([table("a", 1000), table("b", 900)], num_collisions=5)
    output = collection(KeyedJaggedTensor(["a", "b"], torch.tensor([1, 2]), lengths=torch.tensor([1, 1])))
    assert output.keys() == ["a__0", "a__1", "b__0", "b__1"]
    assert len(collection.collections) == 1


def test_one_width_is_required() -> None:
    with pytest.raises(ValueError, match=r"one embedding_dim, got tables of \[4, 8\]"):
        GeneratedFeatures([table("a", 100), table("b", 100, dim=4)], num_collisions=4)
