"""Frequency-based double hashing against a plain loop, and what it is for: fewer ids are confused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.hashing import salt
from recemb.memory import estimate_memory
from recemb.methods.double_hash import DoubleHash
from recemb.methods.hashing import Hashing
from tests.embedding_cases import BIG, MULTI_HOT, SINGLE, bags, small_tables, table
from tests.methods.plain import all_vectors, check_batch, group_of, rows_of
from tests.test_hashing import plain_slot

SIZES = {"t_ad": 4000, "t_item": 6000, "t_site": 500, "t_one": 1}


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("num_embeddings", [1, 60, 2000, 10_501])
@pytest.mark.parametrize("own_fraction", [0.0, 0.3, 0.99])
def test_vectors_equal_a_plain_loop(ids: list[list[list[int]]], num_embeddings: int, own_fraction: float) -> None:
    method = partial(DoubleHash, num_embeddings=num_embeddings, own_fraction=own_fraction)
    collection = CompressedEmbeddingBagCollection(small_tables(), method)
    weight = rows_of(group_of(collection))
    rows = {name: min(max(num_embeddings * size // 10_501, 1), size) for name, size in SIZES.items()}

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        name = config.name
        start = sum(list(rows.values())[: list(rows).index(name)])
        own = rows[name] if rows[name] == SIZES[name] else int(rows[name] * own_fraction)
        if value < own:
            return weight[start + value]
        slots = [plain_slot(value, salt(name, lookup), rows[name] - own) for lookup in (0, 1)]
        return weight[start + own + slots[0]] + weight[start + own + slots[1]]

    check_batch(collection, vector, ids)


def test_bytes_are_the_rows_and_grow_with_the_knob() -> None:
    low, high = DoubleHash.budget_range(small_tables())
    reports = [
        estimate_memory(small_tables(), partial(DoubleHash, num_embeddings=rows))
        for rows in [*range(low, high, 301), high]
    ]
    sizes = [report.table_bytes for report in reports]
    assert sizes == sorted(sizes)
    assert sizes[-1] == reports[-1].full_bytes


def test_frequent_ids_share_nothing() -> None:
    collection = CompressedEmbeddingBagCollection(
        [table("a", 1000)], partial(DoubleHash, num_embeddings=100, own_fraction=0.4)
    )
    weight = rows_of(group_of(collection))
    vectors = all_vectors(collection, "a", 1000)
    assert torch.equal(vectors[:40], weight[:40])
    weight[:40] = 0
    assert torch.equal(all_vectors(collection, "a", 1000)[40:], vectors[40:])


def test_two_hashes_tell_apart_ids_that_one_confuses() -> None:
    """10,000 ids on 500 rows: one hash has 500 vectors; two have 125,250 pairs, about 9,600 distinct."""
    tables = [table("a", 10_000)]
    once = CompressedEmbeddingBagCollection(tables, partial(Hashing, num_embeddings=500))
    twice = CompressedEmbeddingBagCollection(tables, partial(DoubleHash, num_embeddings=500, own_fraction=0.0))
    assert torch.unique(all_vectors(once, "a", 10_000), dim=0).shape[0] == 500
    assert torch.unique(all_vectors(twice, "a", 10_000), dim=0).shape[0] > 9600


def test_own_and_hashed_vectors_start_with_the_variance_of_a_full_table() -> None:
    torch.manual_seed(0)
    n = 20_000
    collection = CompressedEmbeddingBagCollection([table("a", n, dim=32)], partial(DoubleHash, num_embeddings=4000))
    vectors = all_vectors(collection, "a", n)
    assert 0.95 < float(vectors[:2000].var()) * 3 * n < 1.05
    assert 0.95 < float(vectors[2000:].var()) * 3 * n < 1.1


def test_ids_above_float32_integers_stay_apart() -> None:
    collection = CompressedEmbeddingBagCollection([table("a", 2**26)], partial(DoubleHash, num_embeddings=1000))
    output = collection(bags(["a"], [[[BIG], [BIG + 1], [BIG + 2]]]))["a"]
    assert torch.unique(output, dim=0).shape[0] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_embeddings": 0}, "num_embeddings must be at least 1 row, got 0"),
        ({"num_embeddings": 5, "own_fraction": 1.0}, r"own_fraction must be in \[0, 1\), got 1.0"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DoubleHash([table("a", 10)], **options)  # type: ignore[arg-type]
