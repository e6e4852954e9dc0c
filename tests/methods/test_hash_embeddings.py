"""Hash embeddings against a plain loop of the paper's formula, and their traps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.hashing import salt
from recemb.memory import estimate_memory
from recemb.method import UNBOUNDED
from recemb.methods.hash_embeddings import HashEmbeddings
from tests.embedding_cases import BIG, MULTI_HOT, SINGLE, bags, small_tables, table
from tests.methods.plain import all_vectors, check_batch, group_of, rows_of
from tests.test_hashing import plain_slot

SIZES = {"t_ad": 4000, "t_item": 6000, "t_site": 500, "t_one": 1}
# k -> sets of weights a row of the physical table, and its width.
PACKING = {1: (4, 4), 2: (2, 4), 3: (1, 4), 5: (1, 8)}


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("num_lookups", list(PACKING))
@pytest.mark.parametrize("weights_per_row", [1, 10, 1000], ids=["few", "hashed", "one an id"])
def test_vectors_equal_the_formula(ids: list[list[list[int]]], num_lookups: int, weights_per_row: int) -> None:
    num_embeddings = 97
    method = partial(
        HashEmbeddings, num_embeddings=num_embeddings, num_lookups=num_lookups, weights_per_row=weights_per_row
    )
    collection = CompressedEmbeddingBagCollection(small_tables(), method)
    group = group_of(collection)
    pool, weights = rows_of(group, 0), rows_of(group, 1)
    weights.copy_(torch.randn_like(weights))
    sets = {name: min(max(num_embeddings * weights_per_row * size // 10_501, 1), size) for name, size in SIZES.items()}
    per_row, width = PACKING[num_lookups]
    assert weights.shape == (sum(-(-count // per_row) for count in sets.values()), width)

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        name = config.name
        count = sets[name]
        position = value if count == SIZES[name] else plain_slot(value, salt(name, num_lookups), count)
        before = list(sets.values())[: list(sets).index(name)]
        row = weights[sum(-(-each // per_row) for each in before) + position // per_row]
        importances = row[position % per_row * num_lookups :][:num_lookups]
        return sum(  # type: ignore[return-value]
            importances[j] * pool[plain_slot(value, salt(name, j), num_embeddings)] for j in range(num_lookups)
        )

    check_batch(collection, vector, ids)


def test_bytes_by_hand() -> None:
    tables = [table("a", 90_000, dim=16), table("b", 10_000, dim=16)]
    report = estimate_memory(tables, partial(HashEmbeddings, num_embeddings=1000))
    assert report.table_bytes == 1000 * 16 * 4 + 10_000 * 2 * 4
    own = estimate_memory(tables, partial(HashEmbeddings, num_embeddings=1000, weights_per_row=100))
    assert own.table_bytes == 1000 * 16 * 4 + 100_000 * 2 * 4


def test_bytes_grow_with_the_knob() -> None:
    low, high = HashEmbeddings.budget_range(small_tables())
    sizes = [
        estimate_memory(small_tables(), partial(HashEmbeddings, num_embeddings=rows)).serving_bytes
        for rows in [*range(low, high, 301), high]
    ]
    assert sizes == sorted(sizes)


def test_ids_with_the_same_rows_are_told_apart_by_their_weights() -> None:
    """One row in the pool: only weights are left, and the vectors of two ids are multiples of each other."""
    collection = CompressedEmbeddingBagCollection(
        [table("a", 50)], partial(HashEmbeddings, num_embeddings=1, weights_per_row=50)
    )
    weights = rows_of(group_of(collection), 1)
    weights.copy_(torch.rand_like(weights))
    vectors = all_vectors(collection, "a", 50)
    assert torch.unique(vectors, dim=0).shape[0] == 50
    assert int(torch.linalg.matrix_rank(vectors)) == 1


def test_equal_ids_of_two_features_take_different_rows() -> None:
    tables = [table("a", 5000), table("b", 5000)]
    collection = CompressedEmbeddingBagCollection(tables, partial(HashEmbeddings, num_embeddings=1000))
    equal = (all_vectors(collection, "a", 5000) == all_vectors(collection, "b", 5000)).all(dim=1)
    assert int(equal.sum()) < 5


def test_vectors_start_with_the_variance_of_full_tables() -> None:
    torch.manual_seed(0)
    n = 20_000
    for k in (1, 2, 4):
        method = partial(HashEmbeddings, num_embeddings=4000, num_lookups=k)
        collection = CompressedEmbeddingBagCollection([table("a", n, dim=16)], method)
        assert 0.9 < float(all_vectors(collection, "a", n).var()) * 3 * n < 1.1


def test_unbounded_ids_are_hashed_without_overflow() -> None:
    tables = [table("a", UNBOUNDED), table("b", 1000)]
    collection = CompressedEmbeddingBagCollection(tables, partial(HashEmbeddings, num_embeddings=64))
    output = collection(bags(["a", "b"], [[[2**63 - 1], [BIG], [BIG + 1]], [[0], [999], [1]]]))
    assert output.values().shape == (3, 16)
    assert torch.unique(output["a"], dim=0).shape[0] == 3


@pytest.mark.parametrize(
    "options",
    [{"num_embeddings": 0}, {"num_embeddings": 1, "num_lookups": 0}, {"num_embeddings": 1, "weights_per_row": 0}],
)
def test_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got"):
        HashEmbeddings([table("a", 10)], **options)
