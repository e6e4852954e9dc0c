"""Methods that can start from trained full tables: exactly where an id keeps its row, as means where it shares."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.method import Method
from recemb.methods.complementary import Complementary
from recemb.methods.double_hash import DoubleHash
from recemb.methods.hash_embeddings import HashEmbeddings
from recemb.methods.memcom import Memcom
from recemb.methods.path import Path
from tests.embedding_cases import table
from tests.methods.plain import all_vectors, group_of

TABLES = [table("small", 3), table("a", 400), table("b", 90, features=["b", "b2"])]


def seeded(method: Method) -> tuple[CompressedEmbeddingBagCollection, dict[str, Tensor], list[str]]:
    collection = CompressedEmbeddingBagCollection(TABLES, method)
    trained = {config.name: torch.randn(config.num_embeddings, 8) for config in TABLES}
    return collection, trained, group_of(collection).seed_from(trained)


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_tables_that_stay_full_are_taken_over_by_partitions(operation: str) -> None:
    collection, trained, names = seeded(partial(Complementary, num_collisions=1, operation=operation))
    assert names == ["t_small", "t_a", "t_b"]
    for key in ("small", "a", "b"):
        torch.testing.assert_close(all_vectors(collection, key, len(trained[f"t_{key}"])), trained[f"t_{key}"])
    collection, trained, names = seeded(partial(Complementary, num_collisions=5, operation=operation))
    assert names == ["t_small"]
    torch.testing.assert_close(all_vectors(collection, "small", 3), trained["t_small"])


def test_tables_that_stay_full_are_taken_over_by_paths() -> None:
    collection, trained, names = seeded(partial(Path, num_collisions=5))
    assert names == ["t_small"]
    torch.testing.assert_close(all_vectors(collection, "small", 3), trained["t_small"])


def test_memcom_starts_at_the_means_of_its_buckets() -> None:
    collection, trained, names = seeded(partial(Memcom, num_embeddings=493 // 7))
    assert names == ["t_small", "t_a", "t_b"]
    torch.testing.assert_close(all_vectors(collection, "small", 3), trained["t_small"].mean(dim=0).expand(3, 8))
    num_rows = 70 * 400 // 493
    means = torch.stack([trained["t_a"][row::num_rows].mean(dim=0) for row in range(num_rows)])
    torch.testing.assert_close(all_vectors(collection, "a", 400), means[torch.arange(400) % num_rows])


@pytest.mark.parametrize("own_fraction", [0.0, 0.5])
def test_double_hashes_average_the_means_of_both_buckets(own_fraction: float) -> None:
    collection, trained, names = seeded(partial(DoubleHash, num_embeddings=100, own_fraction=own_fraction))
    assert names == ["t_small", "t_a", "t_b"]
    group = group_of(collection)
    assert isinstance(group, DoubleHash)
    rows = 100 * 400 // 493
    own = int(rows * own_fraction)
    vectors = all_vectors(collection, "a", 400)
    torch.testing.assert_close(vectors[:own], trained["t_a"][:own])
    slots = [group._rows.of_feature(1, torch.arange(own, 400), lookup) for lookup in (0, 1)]
    both = torch.cat(slots)
    values = trained["t_a"][own:].repeat(2, 1)
    for position in (0, 5, 200):
        means = [values[both == slot[position]].mean(dim=0) for slot in slots]
        torch.testing.assert_close(vectors[own + position], (means[0] + means[1]) / 2)


def test_hash_embeddings_come_closer_to_the_trained_vectors_than_at_random() -> None:
    collection, trained, names = seeded(partial(HashEmbeddings, num_embeddings=10_000))
    assert names == ["t_small", "t_a", "t_b"]
    # 493 ids with two rows each of 10,000: four in five share neither, and find their own vector again.
    distances = (all_vectors(collection, "a", 400) - trained["t_a"]).norm(dim=1)
    assert float((distances < 1e-4).double().mean()) > 0.7
    assert float(distances.mean()) < 0.5 * float(trained["t_a"].norm(dim=1).mean())
