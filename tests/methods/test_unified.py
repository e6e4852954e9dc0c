"""Unified embeddings against a plain loop over probes, and the traps of multiplexing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.hashing import salt
from recemb.method import UNBOUNDED
from recemb.methods.unified import Unified
from tests.embedding_cases import BIG, KEYS, MULTI_HOT, SINGLE, bags, pool_plainly, small_tables, table
from tests.test_hashing import plain_slot


def plain_vectors(
    unified: Unified, num_lookups: dict[str, int], num_sub_tables: int, ids: list[list[list[int]]]
) -> dict[str, dict[int, torch.Tensor]]:
    """Per feature and id: the rows of its lookups side by side; lookup q of all tables reads sub-table q mod S."""
    weights = [
        unified.collection(index).embedding_bags[f"unified__{index}"].weight.detach() for index in range(num_sub_tables)
    ]
    vectors: dict[str, dict[int, torch.Tensor]] = {}
    first = 0
    for config in unified.tables:
        for feature in config.feature_names:
            wanted = {value for bag in ids[KEYS.index(feature)] for value in bag} | {0}
            vectors[feature] = {}
            for value in wanted:
                rows = []
                for chunk in range(num_lookups[config.name]):
                    sub_table = weights[(first + chunk) % num_sub_tables]
                    rows.append(sub_table[plain_slot(value, salt(config.name, chunk), sub_table.shape[0])])
                vectors[feature][value] = torch.cat(rows)
        first += num_lookups[config.name]
    return vectors


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize(("num_lookups", "num_sub_tables"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_vectors_equal_a_plain_loop_over_probes(
    ids: list[list[list[int]]], num_lookups: int, num_sub_tables: int
) -> None:
    tables = small_tables()
    method = partial(Unified, num_embeddings=97, num_lookups=num_lookups, num_sub_tables=num_sub_tables)
    collection = CompressedEmbeddingBagCollection(tables, method)
    unified = collection.groups[0]
    assert isinstance(unified, Unified)
    counts = {config.name: num_lookups for config in tables}
    expected = pool_plainly(plain_vectors(unified, counts, num_sub_tables, ids), ids, [False, True, True, False, False])
    torch.testing.assert_close(collection(bags(KEYS, ids)).values(), expected)


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("num_sub_tables", [1, 2, 3])
def test_features_may_take_different_numbers_of_lookups(ids: list[list[list[int]]], num_sub_tables: int) -> None:
    """One width for all: a table twice as wide takes twice the lookups."""
    tables = [table("ad", 4000, dim=12), *small_tables(4)[1:3], table("one", 1, dim=8)]
    counts = {"t_ad": 3, "t_item": 1, "t_site": 1, "t_one": 2}
    method = partial(Unified, num_embeddings=50, num_lookups=counts, num_sub_tables=num_sub_tables)
    collection = CompressedEmbeddingBagCollection(tables, method)
    unified = collection.groups[0]
    assert isinstance(unified, Unified)
    expected = pool_plainly(plain_vectors(unified, counts, num_sub_tables, ids), ids, [False, True, True, False, False])
    torch.testing.assert_close(collection(bags(KEYS, ids)).values(), expected)


def test_sub_tables_start_at_the_means_of_their_ids() -> None:
    tables = [table("a", 30), table("b", 20, features=["b", "b2"]), table("c", 10)]
    unified = Unified(tables, num_embeddings=21, num_lookups=2, num_sub_tables=3)
    trained = {config.name: torch.randn(config.num_embeddings, 8) for config in tables}
    assert unified.seed_from(trained) == ["t_a", "t_b", "t_c"]
    values: dict[tuple[int, int], list[torch.Tensor]] = {}
    for number, config in enumerate(tables):
        for chunk in range(2):
            for value, vector in enumerate(trained[config.name]):
                row = (2 * number + chunk) % 3, plain_slot(value, salt(config.name, chunk), 7)
                values.setdefault(row, []).append(vector[4 * chunk : 4 * chunk + 4])
    assert len(values) == 21
    for (sub_table, row), parts in values.items():
        weight = unified.collection(sub_table).embedding_bags[f"unified__{sub_table}"].weight
        torch.testing.assert_close(weight[row].detach(), torch.stack(parts).mean(dim=0))


def test_same_value_of_two_features_falls_on_different_rows() -> None:
    tables = [table("a", 10_000, dim=4), table("b", 10_000, dim=4)]
    collection = CompressedEmbeddingBagCollection(tables, partial(Unified, num_embeddings=1000))
    ids = torch.arange(10_000).repeat(2)
    output = collection(KeyedJaggedTensor(["a", "b"], ids, lengths=torch.ones(20_000, dtype=torch.int64)))
    equal = (output["a"] == output["b"]).all(dim=1).double().mean()
    assert abs(float(equal) - 1 / 1000) < 5 * (1e-3 / 10_000) ** 0.5


def test_several_lookups_tell_apart_ids_that_collide_once() -> None:
    """Joint collisions fall as M**-k: 10,000 ids in 500 rows collide about 20 to a row once, next to never twice."""
    tables = [table("a", 10_000, dim=8)]
    features = KeyedJaggedTensor(["a"], torch.arange(10_000), lengths=torch.ones(10_000, dtype=torch.int64))
    once = CompressedEmbeddingBagCollection(tables, partial(Unified, num_embeddings=500, num_lookups=1))
    twice = CompressedEmbeddingBagCollection(tables, partial(Unified, num_embeddings=500, num_lookups=2))
    assert torch.unique(once(features).values(), dim=0).shape[0] == 500
    # 10,000 ids over 250,000 pairs: 250,000 * (1 - exp(-0.04)) = 9,803 distinct pairs expected.
    assert abs(torch.unique(twice(features).values(), dim=0).shape[0] - 9803) < 60


def test_bytes_do_not_depend_on_the_vocabulary_and_ids_may_be_unbounded() -> None:
    unbounded = CompressedEmbeddingBagCollection([table("a", UNBOUNDED)], partial(Unified, num_embeddings=100))
    ids = bags(["a"], [[[2**63 - 1], [BIG, BIG + 1], []]])
    assert unbounded(ids).values().shape == (3, 8)
    assert sum(parameter.numel() for parameter in unbounded.parameters()) == 800


def test_ids_above_float32_integers_stay_apart() -> None:
    collection = CompressedEmbeddingBagCollection([table("a", 2**26)], partial(Unified, num_embeddings=10_000))
    output = collection(bags(["a"], [[[BIG], [BIG + 1], [BIG + 2]]]))["a"]
    assert torch.unique(output, dim=0).shape[0] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_embeddings": 0}, "num_embeddings and num_sub_tables must be at least 1, got 0 and 1"),
        ({"num_embeddings": 2**40 + 1}, r"num_embeddings must be in \[1, 1099511627776\] rows, got 1099511627777"),
        ({"num_embeddings": 10, "num_sub_tables": 3}, r"num_sub_tables must be at most 2 \(lookups of all .*\), .* 3"),
        ({"num_embeddings": 10, "num_lookups": 3}, "must be a multiple of 4, got num_lookups 3"),
        ({"num_embeddings": 10, "num_lookups": {"t_a": 1}}, r"must name every table; missing \['t_b'\]"),
        ({"num_embeddings": 10, "num_lookups": {"t_c": 1}}, r"names tables \['t_c'\]"),
        ({"num_embeddings": 10, "num_lookups": {"t_a": 1, "t_b": 2}}, r"got 4 \('t_b'\), 8 \('t_a'\)"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Unified([table("a", 10), table("b", 10)], **options)  # type: ignore[arg-type]
