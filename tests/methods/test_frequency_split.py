"""The frequency split against a plain loop, and what it owes frequent ids."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.compression import compress_
from recemb.hashing import salt
from recemb.memory import estimate_memory
from recemb.method import UNBOUNDED
from recemb.methods.frequency_split import FrequencySplit
from tests.embedding_cases import BIG, MULTI_HOT, SINGLE, bags, small_tables, table
from tests.methods.plain import all_vectors, check_batch, group_of, rows_of
from tests.test_hashing import plain_slot

SIZES = {"t_ad": 4000, "t_item": 6000, "t_site": 500, "t_one": 1}


def plain_row(name: str, value: int, num_embeddings: int, own_fraction: float, hash_function: str) -> int:
    rows = {key: min(max(num_embeddings * size // 10_501, 1), size) for key, size in SIZES.items()}
    start = sum(list(rows.values())[: list(rows).index(name)])
    own = SIZES[name] if rows[name] == SIZES[name] else min(int(rows[name] * own_fraction), rows[name] - 1)
    if value < own:
        return start + value
    hashed = rows[name] - own
    return start + own + (value % hashed if hash_function == "modulo" else plain_slot(value, salt(name), hashed))


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("num_embeddings", [1, 97, 1000, 10_501])
@pytest.mark.parametrize(("own_fraction", "hash_function"), [(0.0, "modulo"), (0.5, "universal"), (0.999, "modulo")])
def test_vectors_are_the_rows_of_a_plain_loop(
    ids: list[list[list[int]]], num_embeddings: int, own_fraction: float, hash_function: str
) -> None:
    method = partial(
        FrequencySplit, num_embeddings=num_embeddings, own_fraction=own_fraction, hash_function=hash_function
    )
    collection = CompressedEmbeddingBagCollection(small_tables(), method)
    weight = rows_of(group_of(collection))

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        return weight[plain_row(config.name, value, num_embeddings, own_fraction, hash_function)]

    check_batch(collection, vector, ids)


def test_frequent_ids_share_with_nobody_and_rare_ids_evenly() -> None:
    method = partial(FrequencySplit, num_embeddings=100, own_fraction=0.6)
    collection = CompressedEmbeddingBagCollection([table("a", 1000)], method)
    vectors = all_vectors(collection, "a", 1000)
    _, inverse, counts = torch.unique(vectors, dim=0, return_inverse=True, return_counts=True)
    assert (counts[inverse[:60]] == 1).all()
    # 940 rare ids on 40 rows.
    assert set(counts[inverse[60:]].tolist()) == {23, 24}


def test_there_is_no_map_to_count() -> None:
    for size in (10**4, 10**7):
        report = estimate_memory([table("a", size)], partial(FrequencySplit, num_embeddings=1000))
        assert report.table_bytes == 1000 * 8 * 4
        assert report.index_bytes <= 32


def test_ids_above_float32_integers_stay_apart() -> None:
    method = partial(FrequencySplit, num_embeddings=10_000)
    output = CompressedEmbeddingBagCollection([table("a", 2**26)], method)(
        bags(["a"], [[[BIG], [BIG + 1], [BIG + 2]]])
    )["a"]
    assert torch.unique(output, dim=0).shape[0] == 3


def test_rows_of_one_id_start_exactly_at_trained_ones_and_shared_ones_at_the_mean() -> None:
    full = EmbeddingBagCollection(tables=[table("a", 300), table("b", 40)])
    trained = {name: bag.weight.detach().clone() for name, bag in full.embedding_bags.items()}
    compressed = compress_(full, partial(FrequencySplit, num_embeddings=34), seed_from_weights=True)
    assert isinstance(compressed, CompressedEmbeddingBagCollection)
    vectors = all_vectors(compressed, "a", 300)
    # 30 rows: 15 own, 15 shared.
    assert torch.equal(vectors[:15], trained["t_a"][:15])
    for rest in range(15):
        members = trained["t_a"][15:][(torch.arange(15, 300) % 15) == rest]
        torch.testing.assert_close(vectors[15 + rest], members.mean(dim=0))


def test_ids_without_an_order_of_frequency_are_refused() -> None:
    with pytest.raises(ValueError, match="unbounded"):
        CompressedEmbeddingBagCollection([table("a", UNBOUNDED)], partial(FrequencySplit, num_embeddings=10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_embeddings": 0}, "num_embeddings must be at least 1 row, got 0"),
        ({"num_embeddings": 10, "own_fraction": 1.0}, r"own_fraction must be in \[0, 1\), got 1.0"),
        ({"num_embeddings": 10, "hash_function": "md5"}, "hash_function must be one of .*, got 'md5'"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrequencySplit([table("a", 100)], **options)  # type: ignore[arg-type]
