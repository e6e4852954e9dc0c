"""The hashing trick against a plain loop, and its traps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.bags import Bags
from recemb.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recemb.compression import compress_
from recemb.hashing import salt
from recemb.memory import estimate_memory
from recemb.method import UNBOUNDED
from recemb.methods.hashing import Hashing
from tests.embedding_cases import BIG, MULTI_HOT, SINGLE, bags, small_tables, table
from tests.methods.plain import all_vectors, check_batch, group_of, rows_of
from tests.test_hashing import plain_slot

SIZES = {"t_ad": 4000, "t_item": 6000, "t_site": 500, "t_one": 1}


def plain_row(name: str, value: int, num_embeddings: int, hash_function: str, shared: bool) -> int:
    """Row of one id, from the definition."""
    if shared:
        if hash_function == "universal":
            return plain_slot(value, salt(name), num_embeddings)
        before = sum(list(SIZES.values())[: list(SIZES).index(name)])
        return (before + value) % num_embeddings
    rows = {key: min(max(num_embeddings * size // 10_501, 1), size) for key, size in SIZES.items()}
    start = sum(list(rows.values())[: list(rows).index(name)])
    if hash_function == "modulo":
        return start + value % rows[name]
    return start + (value if rows[name] == SIZES[name] else plain_slot(value, salt(name), rows[name]))


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("num_embeddings", [1, 97, 1000, 10_501])
@pytest.mark.parametrize("hash_function", ["universal", "modulo"])
@pytest.mark.parametrize("shared", [False, True], ids=["per table", "shared"])
def test_vectors_are_the_rows_a_plain_loop_hashes_to(
    ids: list[list[list[int]]], num_embeddings: int, hash_function: str, shared: bool
) -> None:
    method = partial(Hashing, num_embeddings=num_embeddings, hash_function=hash_function, shared=shared)
    collection = CompressedEmbeddingBagCollection(small_tables(), method)
    weight = rows_of(group_of(collection))

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        return weight[plain_row(config.name, value, num_embeddings, hash_function, shared)]

    check_batch(collection, vector, ids)


def test_rows_are_shared_out_in_proportion_and_full_tables_keep_theirs() -> None:
    sizes = [table("a", 9000), table("b", 1000), table("c", 2)]
    report = estimate_memory(sizes, partial(Hashing, num_embeddings=1000))
    assert report.table_bytes == (899 + 99 + 1) * 8 * 4
    full = CompressedEmbeddingBagCollection(sizes, partial(Hashing, num_embeddings=10_002))
    for name, size in (("a", 9000), ("b", 1000), ("c", 2)):
        assert torch.unique(all_vectors(full, name, size), dim=0).shape[0] == size


@pytest.mark.parametrize("shared", [False, True])
def test_bytes_grow_with_the_knob(shared: bool) -> None:
    low, high = Hashing.budget_range(small_tables())
    sizes = [
        estimate_memory(small_tables(), partial(Hashing, num_embeddings=rows, shared=shared)).serving_bytes
        for rows in [*range(low, high, 487), high]
    ]
    assert sizes == sorted(sizes)


def test_remainders_keep_the_most_frequent_ids_apart() -> None:
    collection = CompressedEmbeddingBagCollection(
        [table("a", 1000)], partial(Hashing, num_embeddings=100, hash_function="modulo")
    )
    vectors = all_vectors(collection, "a", 200)
    assert torch.unique(vectors[:100], dim=0).shape[0] == 100
    assert torch.equal(vectors[:100], vectors[100:])


def test_tables_start_with_the_variance_of_their_own_full_tables() -> None:
    tables = [table("a", 200_000), table("b", 200)]
    collection = CompressedEmbeddingBagCollection(tables, partial(Hashing, num_embeddings=20_020))
    for name, size in (("a", 200_000), ("b", 200)):
        variance = float(all_vectors(collection, name, size).var())
        assert 0.5 < variance * 3 * size < 1.6


@pytest.mark.parametrize("hash_function", ["universal", "modulo"])
@pytest.mark.parametrize("shared", [False, True])
def test_unbounded_ids_are_hashed_without_overflow(hash_function: str, shared: bool) -> None:
    tables = [table("a", 1000), table("b", UNBOUNDED), table("c", UNBOUNDED)]
    method = partial(Hashing, num_embeddings=101, hash_function=hash_function, shared=shared)
    collection = CompressedEmbeddingBagCollection(tables, method)
    largest = 2**63 - 1
    output = collection(bags(["a", "b", "c"], [[[999], [0]], [[largest], [BIG]], [[largest], [BIG + 1]]]))
    weight = rows_of(group_of(collection))
    for key, value in (("b", largest), ("c", largest)):
        start = 0 if shared else {"b": 33, "c": 66}[key]
        num_slots = 101 if shared else 33
        slot = plain_slot(value, salt(f"t_{key}"), num_slots)
        if hash_function == "modulo":
            slot = (value + (1000 if shared else 0)) % num_slots
        assert torch.equal(output[key][0], weight[start + slot])


def test_ids_above_float32_integers_stay_apart() -> None:
    for hash_function in ("universal", "modulo"):
        method = partial(Hashing, num_embeddings=10_000, hash_function=hash_function)
        output = CompressedEmbeddingBagCollection([table("a", 2**26)], method)(
            bags(["a"], [[[BIG], [BIG + 1], [BIG + 2]]])
        )["a"]
        assert torch.unique(output, dim=0).shape[0] == 3


def test_other_seeds_collide_other_ids() -> None:
    tables = [table("a", 1000)]
    features = bags(["a"], [[[i] for i in range(1000)]])
    rows = []
    for seed in (0, 1):
        method = Hashing(tables, num_embeddings=100, seed=seed)
        rows.append(torch.unique(method.remap(Bags.of(features))[0][0], return_inverse=True)[1])
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("hash_function", ["universal", "modulo"])
def test_rows_can_start_at_the_mean_of_trained_rows(shared: bool, hash_function: str) -> None:
    tables = [table("a", 300), table("b", 40)]
    full = EmbeddingBagCollection(tables=tables)
    trained = {name: bag.weight.detach().clone() for name, bag in full.embedding_bags.items()}
    method = partial(Hashing, num_embeddings=34, shared=shared, hash_function=hash_function)
    compressed = compress_(full, method, seed_from_weights=True)
    assert isinstance(compressed, CompressedEmbeddingBagCollection)
    group = group_of(compressed)
    weight = rows_of(group)
    ids = [(f"t_{key}", value) for key, size in (("a", 300), ("b", 40)) for value in range(size)]
    by_row: dict[bytes, list[Tensor]] = {}
    for name, value in ids:
        vector = all_vectors(compressed, name[2:], value + 1)[value]
        by_row.setdefault(vector.numpy().tobytes(), []).append(trained[name][value])
    assert 30 <= len(by_row) <= 34
    for row in weight:
        if (members := by_row.get(row.numpy().tobytes())) is not None:
            torch.testing.assert_close(row, torch.stack(members).mean(dim=0))


def test_full_tables_are_seeded_exactly_and_sequences_read_the_same_rows() -> None:
    tables = [table("a", 300), table("b", 40)]
    rows = {"t_a": torch.randn(300, 8), "t_b": torch.randn(40, 8)}
    method = Hashing(tables, num_embeddings=340)
    assert method.seed_from(rows) == ["t_a", "t_b"]
    assert torch.equal(rows_of(method), torch.cat(list(rows.values())))


def test_unpooled_vectors_equal_pooled_bags_of_one() -> None:
    torch.manual_seed(0)
    pooled = CompressedEmbeddingBagCollection([table("a", 300)], partial(Hashing, num_embeddings=30))
    unpooled = CompressedEmbeddingCollection(
        [EmbeddingConfig(name="t_a", num_embeddings=300, embedding_dim=8, feature_names=["a"])],
        partial(Hashing, num_embeddings=30),
    )
    unpooled.load_state_dict(pooled.state_dict())
    one_each = bags(["a"], [[[7], [299], [0]]])
    together = bags(["a"], [[[7, 299], [], [0]]])
    assert torch.equal(unpooled(together)["a"].values(), pooled(one_each)["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_embeddings": 0}, "num_embeddings must be at least 1 row, got 0"),
        ({"num_embeddings": 10, "hash_function": "md5"}, "hash_function must be one of .*, got 'md5'"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hashing([table("a", 10)], **options)  # type: ignore[arg-type]
