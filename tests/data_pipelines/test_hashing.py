"""Ids without a vocabulary: XXH64 of the raw value, frozen for ever."""

from __future__ import annotations

import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.hashing import hash_values

GOLDEN_STRINGS = [
    8620854627038688460,
    7577133169179506477,
    3359235359314614258,
    66341864164162517,
    5276337238841775703,
    0,
]
GOLDEN_INTEGERS = [1901844396197645789, 5734460614224530634, 4821274198456001380, 9203218195332676486]

int64s = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.one_of(st.none(), st.text(max_size=80)), max_size=30))
@settings(deadline=None)
def test_strings_hash_as_the_reference_implementation_does(values: list[str | None]) -> None:
    expected = [0 if value is None else xxhash.xxh64_intdigest(value.encode()) >> 1 for value in values]
    assert hash_values(pa.array(values, pa.string())).tolist() == expected


@given(st.lists(st.one_of(st.none(), int64s), max_size=30))
@settings(deadline=None)
def test_integers_hash_as_their_eight_bytes(values: list[int | None]) -> None:
    expected = [
        0 if value is None else xxhash.xxh64_intdigest(value.to_bytes(8, "little", signed=True)) >> 1
        for value in values
    ]
    assert hash_values(pa.array(values, pa.int64())).tolist() == expected


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int32(), pa.uint64()])
def test_width_of_an_integer_column_does_not_matter(kind: pa.DataType) -> None:
    values = [0, 1, 7, 100]
    assert hash_values(pa.array(values, kind)).tolist() == hash_values(pa.array(values, pa.int64())).tolist()


def test_slices_of_a_column_hash_as_their_own_values() -> None:
    column = pa.array(["a", "bb", None, "68fd1e64", "x" * 40])
    assert hash_values(column.slice(2)).tolist() == hash_values(column).tolist()[2:]


def test_hashes_are_frozen() -> None:
    """Golden values: changing one destroys every model trained on hashed ids."""
    values = pa.array(["", "a", "68fd1e64", "05db9164", "a string of more than thirty-one bytes", None])
    assert hash_values(values).tolist() == GOLDEN_STRINGS
    assert hash_values(pa.array([0, 1, -1, 2**63 - 1])).tolist() == GOLDEN_INTEGERS
