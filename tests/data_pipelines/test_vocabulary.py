"""Ids by train frequency against a plain counter."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.vocabulary import TrainCounter, ValueIndex, rank
from tests.data_pipelines import truth


def encode(batches: list[pa.Array], num_train: int, min_count: int) -> tuple[list[int], list[object], list[int]]:
    """Ids of all batches when the first ``num_train`` batches are train."""
    index = ValueIndex()
    provisional = [index.provisional_ids(batch) for batch in batches]
    counter = TrainCounter(len(index))
    for ids in provisional[:num_train]:
        counter.add(ids)
    ranked = rank(index, counter.counts, min_count)
    assert ranked.values is not None
    ids = ranked.remap[np.concatenate(provisional)].tolist()
    return ids, ranked.values.to_pylist(), ranked.train_counts.tolist()


@given(
    st.lists(st.lists(st.one_of(st.none(), st.text(max_size=3)), min_size=1, max_size=20), min_size=2, max_size=5),
    st.integers(1, 3),
)
@settings(deadline=None)
def test_ids_of_strings_follow_counts_then_bytes(batches: list[list[str | None]], min_count: int) -> None:
    train, rest = batches[0], [value for batch in batches[1:] for value in batch]
    ids, values, counts = encode([pa.array(batch, pa.string()) for batch in batches], 1, min_count)
    # Text is ordered by its bytes, Python's by code points: the same order for UTF-8.
    expected = truth.vocabulary(train, min_count)
    assert ids == [expected.get(value, 0) for value in train + rest]
    assert values == [None, *expected]
    assert counts == [sum(value not in expected for value in train), *(train.count(value) for value in expected)]


@given(st.lists(st.one_of(st.none(), st.integers(-20, 200)), min_size=1, max_size=60), st.integers(1, 3))
@settings(deadline=None)
def test_ids_of_integers_follow_counts_then_size(values: list[int | None], min_count: int) -> None:
    ids, stored, _ = encode([pa.array(values, pa.int32())], 1, min_count)
    expected = truth.vocabulary(values, min_count)
    assert ids == [expected.get(value, 0) for value in values]
    assert stored == [None, *expected]


def test_values_that_train_never_saw_are_out_of_vocabulary() -> None:
    ids, values, _ = encode([pa.array(["a", "b", "b"]), pa.array(["c", "a", None])], 1, 1)
    assert ids == [2, 1, 1, 0, 2, 0]
    assert values == [None, "b", "a"]


def test_threads_do_not_change_the_ids() -> None:
    random = np.random.default_rng(0)
    batches = [pa.array([f"{value:x}" for value in random.zipf(1.3, 2000) % 5000]) for _ in range(16)]

    def ids(threads: int) -> list[list[int]]:
        index = ValueIndex()
        with ThreadPoolExecutor(threads) as pool:
            provisional = list(pool.map(index.provisional_ids, batches))
        counter = TrainCounter(len(index))
        for batch in provisional:
            counter.add(batch)
        remap = rank(index, counter.counts, 1).remap
        return [remap[batch].tolist() for batch in provisional]

    assert ids(1) == ids(8)


def test_counts_are_the_same_for_small_and_large_vocabularies() -> None:
    ids = np.random.default_rng(0).integers(0, 50, 400, dtype=np.int32)
    for num_values in (50, 100_000):
        counter = TrainCounter(num_values)
        counter.add(ids)
        counter.add(ids)
        np.testing.assert_array_equal(counter.counts, 2 * np.bincount(ids, minlength=num_values))


def test_dictionary_columns_with_null_values_are_read() -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2], pa.int32()), pa.array(["x", None, "y"]))
    index = ValueIndex()
    ids = index.provisional_ids(column)
    assert index.values(ids).to_pylist() == ["x", None, None, "y"]
    assert len(index) == 3


def test_strings_and_integers_in_one_table_are_refused() -> None:
    index = ValueIndex()
    index.provisional_ids(pa.array(["1"]))
    with pytest.raises(ValueError, match="all string or all int64"):
        index.provisional_ids(pa.array([1]))
