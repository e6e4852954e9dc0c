"""Numbers and lists against plain Python."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import transforms
from tests.data_pipelines import truth


@given(st.lists(st.one_of(st.none(), st.integers(-1000, 2**40)), max_size=50))
@settings(deadline=None)
def test_bucket_follows_the_published_rule(values: list[int | None]) -> None:
    column = transforms.to_float64(pa.array(values, pa.int64()))
    assert transforms.bucket(column).to_pylist() == [truth.bucket(value) for value in values]


def test_bucket_by_hand() -> None:
    values = [None, -3, 0, 1, 2, 3, 4, 5, 8, 100, 2.5, -1.5]
    expected = [None, -3, 0, 1, 2, 1, 1, 2, 4, 21, 0, -1]
    assert transforms.bucket(transforms.to_float64(pa.array(values, pa.float64()))).to_pylist() == expected


@given(st.lists(st.one_of(st.none(), st.integers(-10, 2**50)), max_size=50))
@settings(deadline=None)
def test_log1p_takes_negatives_and_missing_as_zero(values: list[int | None]) -> None:
    numbers = transforms.log1p(transforms.to_float64(pa.array(values, pa.int64())))
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, np.array([truth.log1p(value) for value in values], np.float32))


def test_first_not_finite_finds_nan_infinity_and_what_float32_cannot_hold() -> None:
    def first(values: list[float | None]) -> int | None:
        column = pa.array(values, pa.float64())
        return transforms.first_not_finite(transforms.to_float64(column), column)

    assert first([0.0, None, -1e38, 3.0]) is None
    for wrong in (math.nan, math.inf, -math.inf, 1e39):
        assert first([0.0, None, -1e38, wrong]) == 3


@given(
    st.lists(st.one_of(st.none(), st.lists(st.integers(0, 99), max_size=6)), max_size=20),
    st.one_of(st.none(), st.integers(1, 4)),
    st.integers(0, 3),
)
@settings(deadline=None)
def test_keep_latest_cuts_every_list_to_its_end(
    lists: list[list[int] | None], max_length: int | None, start: int
) -> None:
    column = pa.array(lists, pa.list_(pa.int64())).slice(start)
    offsets, entries = transforms.keep_latest(column, max_length)
    expected = [(item or [])[-max_length:] if max_length else item or [] for item in lists[start:]]
    assert pa.ListArray.from_arrays(pa.array(offsets), entries).to_pylist() == expected
