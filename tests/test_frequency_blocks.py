"""Frequency blocks: global over tables, cut by share, monotone in the train count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recemb.frequency_blocks import frequency_blocks, frequent_ids
from recemb.method import UNBOUNDED
from tests.embedding_cases import table

SHARES = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(lambda parts: [part / sum(parts) for part in parts])


@given(counts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), min_size=1, max_size=4), shares=SHARES)
def test_block_falls_with_train_count_over_all_tables_and_has_its_share(
    counts: list[list[int]], shares: list[float]
) -> None:
    tables = [table(str(index), len(own)) for index, own in enumerate(counts)]
    given_counts = {config.name: torch.tensor(own) for config, own in zip(tables, counts, strict=True)}
    blocks = torch.cat(frequency_blocks(tables, shares, given_counts)).tolist()
    flat = [count for own in counts for count in own]
    for count, block in zip(flat, blocks, strict=True):
        assert all(other_block >= block for other, other_block in zip(flat, blocks, strict=True) if other < count)
    for number, share in enumerate(shares):
        assert abs(blocks.count(number) - share * len(flat)) <= 1


def test_ids_of_equal_count_come_in_the_order_of_tables_then_ids() -> None:
    tables = [table("a", 3), table("b", 2)]
    counts = {"t_a": torch.tensor([0, 7, 7]), "t_b": torch.tensor([7, 0])}
    first, second = frequency_blocks(tables, [0.4, 0.4, 0.2], counts)
    # In order: a1, a2 | b0, a0 | b1.
    assert first.tolist() == [1, 0, 0]
    assert second.tolist() == [1, 2]


def test_without_counts_ids_of_one_number_are_alike_in_all_tables() -> None:
    first, second = frequency_blocks([table("a", 4), table("b", 2)], [1 / 3, 2 / 3], None)
    assert first.tolist() == [0, 1, 1, 1]
    assert second.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("shares", "counts", "message"),
    [
        ([0.5, 0.4], None, "add up to 1"),
        ([1.5, -0.5], None, "add up to 1"),
        ([], None, "1 to 256 shares"),
        ([1.0], {}, "'t_a': train_counts are required"),
        ([1.0], {"t_a": torch.zeros(2)}, r"must be \(3,\) counts"),
        ([1.0], {"t_a": torch.tensor([1, -1, 0])}, "of at least 0"),
    ],
)
def test_bad_shares_and_counts_are_refused(
    shares: list[float], counts: dict[str, torch.Tensor] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        frequency_blocks([table("a", 3)], shares, counts)


def test_unbounded_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="have no frequency"):
        frequency_blocks([table("a", UNBOUNDED)], [1.0], None)


@given(
    counts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), min_size=1, max_size=4),
    num_ids=st.integers(0, 130),
    known=st.booleans(),
)
def test_most_frequent_ids_are_those_of_sorting_all(counts: list[list[int]], num_ids: int, known: bool) -> None:
    tables = [table(str(index), len(own)) for index, own in enumerate(counts)]
    given_counts = {config.name: torch.tensor(own) for config, own in zip(tables, counts, strict=True)}
    ranked = sorted(
        (-count if known else i, index, i) for index, own in enumerate(counts) for i, count in enumerate(own)
    )
    chosen = [index for _, index, _ in ranked[:num_ids]]
    expected = [chosen.count(index) for index in range(len(tables))]
    assert frequent_ids(tables, num_ids, given_counts if known else None) == expected


def test_unbounded_ids_are_never_among_the_most_frequent() -> None:
    tables = [table("a", 3), table("hashed", UNBOUNDED), table("b", 2)]
    assert frequent_ids(tables, 4, None) == [2, 0, 2]
    counts = {"t_a": torch.tensor([5, 1, 1]), "t_b": torch.tensor([2, 1])}
    assert frequent_ids(tables, 3, counts) == [2, 0, 1]
    assert frequent_ids([table("hashed", UNBOUNDED)], 3, None) == [0]
