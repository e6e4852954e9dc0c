"""Numbers an id, packed into rows of four: every number is its position's own, and takes 4 bytes."""

from __future__ import annotations

import pytest
import torch
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.packed import PackedNumbers, bytes_for
from tests.embedding_cases import table

TABLES = [table("a", 9, features=["a", "a2"]), table("b", 3), table("c", 6)]
STARTS = [[1.0], [1.0, 0.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0]]


@pytest.mark.parametrize("start", STARTS, ids=len)
def test_every_position_reads_numbers_of_its_own(start: list[float]) -> None:
    packed = PackedNumbers(TABLES, [9, 0, 6], start)
    weight = EmbeddingBagCollection(tables=[packed.table("numbers")]).embedding_bags["numbers"].weight.detach()
    positions = torch.cat([torch.arange(9), torch.arange(6)])
    features = torch.tensor([0] * 9 + [3] * 6)
    slots = packed.slots(positions, features)
    assert packed.numbers(weight[slots], positions).tolist() == [start] * 15
    weight.copy_(torch.arange(weight.numel()).view_as(weight))
    numbers = packed.numbers(weight[slots], positions)
    assert torch.unique(numbers).numel() == 15 * len(start)


@pytest.mark.parametrize("start", STARTS, ids=len)
def test_features_of_one_table_and_both_layouts_read_the_same_rows(start: list[float]) -> None:
    packed = PackedNumbers(TABLES, [9, 3, 6], start)
    ids = torch.tensor([[8, 8, 2, 5]])
    single = packed.slots(ids, None).view(-1)
    assert single[0] == single[1]
    assert torch.equal(single, packed.slots(ids.view(-1), torch.arange(4)))
    assert int(single[3]) == sum(packed.num_rows) - 1


@pytest.mark.parametrize(("count", "expected"), [(1, 3 * 16), (2, 5 * 16), (3, 9 * 16), (4, 9 * 16), (5, 9 * 32)])
def test_bytes_are_counted_as_allocated(count: int, expected: int) -> None:
    packed = PackedNumbers(TABLES[:1], [9], [1.0] * count)
    config = packed.table("numbers")
    assert config.num_embeddings * config.embedding_dim * 4 == bytes_for(9, count) == expected
