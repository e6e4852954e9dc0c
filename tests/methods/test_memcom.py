"""MEmCom against a plain loop of the paper's formula, and its traps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.budget import fit_to_budget
from recemb.collection import CompressedEmbeddingBagCollection
from recemb.hashing import salt
from recemb.memory import estimate_memory, measure_memory
from recemb.methods.memcom import Memcom
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from tests.embedding_cases import BIG, MULTI_HOT, SINGLE, bags, small_tables, table
from tests.methods.plain import all_vectors, check_batch, group_of, rows_of
from tests.test_hashing import plain_slot

SGD = partial(torch.optim.SGD, lr=0.1)


def scrambled(collection: CompressedEmbeddingBagCollection) -> Memcom:
    """With random numbers an id in place of the ones they start with."""
    group = group_of(collection)
    assert isinstance(group, Memcom)
    numbers = rows_of(group, 1)
    numbers.copy_(torch.randn_like(numbers))
    return group


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("hash_function", ["universal", "modulo"])
@pytest.mark.parametrize("bias", [False, True])
def test_vectors_equal_the_formula(ids: list[list[list[int]]], hash_function: str, bias: bool) -> None:
    method = partial(Memcom, num_embeddings=1000, hash_function=hash_function, bias=bias)
    # The table that stays full comes first, so that the ranges of the others begin behind it.
    collection = CompressedEmbeddingBagCollection(small_tables()[::-1], method)
    group = scrambled(collection)
    assert group.is_full == [True, False, False, False]
    rows, numbers = rows_of(group), rows_of(group, 1).view(-1, 1 + bias)
    shares = {"t_one": 1, "t_site": 47, "t_item": 571, "t_ad": 380}
    sizes = {"t_one": 0, "t_site": 500, "t_item": 6000, "t_ad": 4000}

    def vector(config: EmbeddingBagConfig, value: int) -> Tensor:
        before = list(shares)[: list(shares).index(config.name)]
        start = sum(shares[name] for name in before)
        if config.name == "t_one":
            return rows[start + value]
        count = shares[config.name]
        slot = value % count if hash_function == "modulo" else plain_slot(value, salt(config.name), count)
        number = numbers[sum(sizes[name] for name in before) + value]
        return rows[start + slot] * number[0] + (number[1] if bias else 0.0)

    check_batch(collection, vector, ids)


def test_an_id_costs_four_bytes_or_eight_with_bias() -> None:
    tables = [table("a", 100_000, dim=16)]
    for bias, per_id in ((False, 4), (True, 8)):
        report = estimate_memory(tables, partial(Memcom, num_embeddings=500, bias=bias))
        assert report.table_bytes == 500 * 16 * 4 + 100_000 * per_id


def test_ratios_up_to_the_dimension_can_be_reached() -> None:
    tables = [table("a", 100_000, dim=16)]
    method = fit_to_budget(tables, Memcom, 100_000 * 64 // 15)
    assert 14.9 < estimate_memory(tables, method).ratio <= 15.5
    with pytest.raises(ValueError, match="cannot be met: the smallest Memcom"):
        fit_to_budget(tables, Memcom, 100_000 * 64 // 17)


def test_bytes_grow_with_the_knob_and_never_exceed_full() -> None:
    low, high = Memcom.budget_range(small_tables())
    reports = [
        estimate_memory(small_tables(), partial(Memcom, num_embeddings=rows)) for rows in [*range(low, high, 301), high]
    ]
    sizes = [report.serving_bytes for report in reports]
    assert sizes == sorted(sizes)
    assert all(report.table_bytes <= report.full_bytes for report in reports)
    assert reports[-1].table_bytes == reports[-1].full_bytes


def test_ids_on_one_row_are_told_apart_by_training() -> None:
    collection = CompressedEmbeddingBagCollection([table("a", 100)], partial(Memcom, num_embeddings=10))
    before = all_vectors(collection, "a", 100)
    assert torch.equal(before[7], before[17])
    model, optimizer = prepare(collection, EmbeddingOptimizer("rowwise_adagrad", 0.1), SGD)
    target = torch.randn(2, 8)
    for _ in range(3):
        optimizer.zero_grad()
        ((model(bags(["a"], [[[7], [17]]])).values() - target) ** 2).sum().backward()
        optimizer.step()
    after = all_vectors(collection, "a", 100)
    assert not torch.equal(after[7], after[17])
    # Another id of the row moves with it, by its own untouched number.
    assert torch.equal(after[27], rows_of(group_of(collection))[7])


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
def test_neighbours_in_a_packed_row_are_left_alone(name: str) -> None:
    collection = CompressedEmbeddingBagCollection([table("a", 100)], partial(Memcom, num_embeddings=10))
    model, optimizer = prepare(collection, EmbeddingOptimizer(name, 0.1), SGD)
    model(bags(["a"], [[[41]]])).values().sum().backward()
    optimizer.step()
    numbers = rows_of(group_of(collection), 1).view(-1)
    assert (numbers != 1).nonzero().view(-1).tolist() == [41]


def test_vectors_start_with_the_variance_of_a_full_table() -> None:
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection([table("a", 20_000, dim=16)], partial(Memcom, num_embeddings=2000))
    assert 0.95 < float(all_vectors(collection, "a", 20_000).var()) * 3 * 20_000 < 1.05


def test_numbers_of_large_ids_are_their_own() -> None:
    collection = CompressedEmbeddingBagCollection([table("a", 2**24 + 8, dim=4)], partial(Memcom, num_embeddings=8))
    group = group_of(collection)
    rows_of(group, 1).view(-1)[BIG : BIG + 2] = torch.tensor([2.0, 3.0])
    output = collection(bags(["a"], [[[BIG], [BIG + 1]]]))["a"]
    rows = rows_of(group)
    assert torch.equal(output, torch.stack([rows[BIG % 8] * 2, rows[(BIG + 1) % 8] * 3]))


def test_full_tables_alone_need_no_numbers() -> None:
    collection = CompressedEmbeddingBagCollection(small_tables(), partial(Memcom, num_embeddings=10_501))
    assert [config.name for config in measure_memory(collection).tables] == ["memcom_rows"]
    assert collection(bags(["ad", "target", "history", "site", "one"], SINGLE)).values().shape == (3, 40)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="num_embeddings must be at least 1 row, got 0"):
        Memcom([table("a", 10)], num_embeddings=0)
    with pytest.raises(ValueError, match="hash_function must be one of"):
        Memcom([table("a", 10)], num_embeddings=1, hash_function="crc")
