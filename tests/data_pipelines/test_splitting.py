"""Which rows go where."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.splitting import RowKeys, SplitRule, assign, mix, select

FROZEN_HELD_OUT = [3, 6, 9, 18, 19, 23, 24, 32, 38]

int64s = st.integers(-(2**63), 2**63 - 1)


def chunked(keys: list[int], days: list[int] | None = None, size: int = 7) -> list[RowKeys]:
    return [
        RowKeys(
            start,
            len(keys[start : start + size]),
            np.array(keys[start : start + size], np.int64),
            None if days is None else np.array(days[start : start + size], np.int64),
        )
        for start in range(0, len(keys), size)
    ]


def numbers(rule: SplitRule, chunks: list[RowKeys]) -> list[int]:
    def passes() -> Iterator[RowKeys]:
        return iter(chunks)

    assignment = assign(rule, passes)
    return np.concatenate([assignment.of(chunk) for chunk in chunks]).tolist()


@given(
    st.one_of(st.lists(int64s, min_size=1, max_size=40), st.lists(st.integers(-5, 5), min_size=1, max_size=40)),
    st.integers(0, 10),
)
@settings(deadline=None)
def test_select_finds_exact_ranks_of_any_64_bit_moments(keys: list[int], tenths: int) -> None:
    (found,) = select(lambda: iter(chunked(keys)), (tenths / 10,))
    assert found == sorted(keys)[min(len(keys) * tenths // 10, len(keys) - 1)]


@given(st.integers(10, 300), st.integers(1, 50))
@settings(deadline=None)
def test_time_split_of_ordered_rows_cuts_at_the_fractions(rows: int, size: int) -> None:
    chunks = [RowKeys(start, min(size, rows - start)) for start in range(0, rows, size)]
    found = numbers(SplitRule("time", (8, 1, 1)), chunks)
    train, validation = rows * 8 // 10, rows * 9 // 10
    assert found == [0] * train + [1] * (validation - train) + [2] * (rows - validation)


def test_time_split_sorts_unordered_moments_and_keeps_equal_ones_together() -> None:
    keys = [5, 1, 9, 9, 2, 3, 4, 9, 1, 0]
    found = numbers(SplitRule("time", (5, 2, 3)), chunked(keys, size=3))
    by_moment: dict[int, set[int]] = {}
    for key, number in zip(keys, found, strict=True):
        by_moment.setdefault(key, set()).add(number)
    assert all(len(splits) == 1 for splits in by_moment.values())
    assert [by_moment[key] for key in sorted(by_moment)] == [{0}, {0}, {0}, {0}, {1}, {1}, {2}]


def test_last_day_is_halved_by_time_and_the_rest_trains() -> None:
    days = [1, 1, 3, 3, 2, 3, 3, 1]
    keys = [10, 11, 35, 31, 20, 33, 39, 12]
    assert numbers(SplitRule("last-day"), chunked(keys, days, size=3)) == [0, 0, 2, 1, 0, 1, 2, 0]


def test_last_day_takes_whole_files_as_days() -> None:
    chunks = [RowKeys(0, 5, days=0), RowKeys(5, 3, days=1), RowKeys(8, 3, days=1)]
    assert numbers(SplitRule("last-day"), chunks) == [0] * 5 + [1] * 3 + [2] * 3


def test_last_day_of_a_single_day_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        numbers(SplitRule("last-day"), [RowKeys(0, 5, days=0)])


def test_random_split_meets_its_shares_and_does_not_depend_on_chunks() -> None:
    rule = SplitRule("random", (8, 1, 1), seed=3)
    whole = numbers(rule, [RowKeys(0, 100_000)])
    assert whole == numbers(rule, [RowKeys(0, 33_333), RowKeys(33_333, 66_667)])
    shares = np.bincount(whole) / len(whole)
    # Four standard deviations of a binomial share.
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=4 * np.sqrt(0.16 / 100_000))


def test_random_splits_of_two_seeds_are_independent() -> None:
    first, second = (np.array(numbers(SplitRule(seed=seed), [RowKeys(0, 100_000)])) > 0 for seed in (1, 2))
    assert abs((first & second).mean() - 0.04) < 4 * np.sqrt(0.04 * 0.96 / 100_000)


def test_random_split_is_frozen() -> None:
    """The same log must split in the same way in every version."""
    assert mix(np.arange(3, dtype=np.uint64)).tolist() == [
        0xE220A8397B1DCDAF,
        0x910A2DEC89025CC1,
        0x975835DE1C9756CE,
    ]
    held_out = np.flatnonzero(numbers(SplitRule(seed=0), [RowKeys(0, 40)]))
    assert held_out.tolist() == FROZEN_HELD_OUT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "chronological"}, "split: must be one of"),
        ({"fractions": (8, 1, 0)}, "three positive"),
        ({"fractions": (8, 2)}, "three positive"),
        ({"fractions": (8, 1, float("nan"))}, "three positive"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_senseless_rules_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitRule(**arguments)  # type: ignore[arg-type]
