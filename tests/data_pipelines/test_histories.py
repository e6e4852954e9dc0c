"""Histories are strictly from the past, whatever the events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.event_store import EventStore, buckets_for
from data_pipelines.histories import BucketRows, History, HistorySource, encoded, entries, past, recoded, user_numbers
from data_pipelines.workspace import staged

# Few users and moments, so that equal ones are common; and moments that fill 64 bits.
MOMENTS = st.one_of(st.integers(0, 5), st.sampled_from([-(2**63), -1, 2**62, 2**63 - 1]))
EVENTS = st.lists(st.tuples(st.integers(0, 3), MOMENTS), max_size=40)


@settings(deadline=None)
@given(events=EVENTS, targets=EVENTS, max_history=st.integers(1, 6))
def test_a_history_is_the_latest_events_strictly_before_the_target(
    events: list[tuple[int, int]], targets: list[tuple[int, int]], max_history: int
) -> None:
    events = sorted(events)
    columns = [np.array([pair[place] for pair in pairs], np.int64) for pairs in (events, targets) for place in (0, 1)]
    starts, ends = past(*columns, max_history)
    offsets, positions = entries(starts, ends)
    for row, (user, moment) in enumerate(targets):
        history = [events[position] for position in positions[offsets[row] : offsets[row + 1]]]
        earlier = [event for event in events if event[0] == user and event[1] < moment]
        assert history == earlier[max(0, len(earlier) - max_history) :]
        assert all(event[1] < moment for event in history)


@settings(deadline=None)
@given(moments=st.lists(MOMENTS, min_size=1, max_size=30))
def test_no_target_knows_itself_or_events_of_its_own_moment(moments: list[int]) -> None:
    events = np.sort(np.array(moments, np.int64))
    users = np.zeros(len(events), np.int64)
    starts, ends = past(users, events, users, events, len(events))
    for row, moment in enumerate(events):
        assert row >= ends[row]
        assert moment not in events[starts[row] : ends[row]]


def test_users_are_numbered_alike_over_two_logs() -> None:
    first, second = user_numbers(pa.chunked_array([["b", "a"], ["b"]]), pa.chunked_array([["c", "a"]]))
    assert (first.tolist(), second.tolist()) == ([0, 1, 0], [2, 1])


def test_recoding_keeps_rows_and_repeated_values() -> None:
    items = encoded(pa.chunked_array([[7, 8, 9, 8]]))
    categories = recoded(items, pa.array(["x", None, "x"]))
    assert categories.to_pylist() == ["x", None, "x", None]
    assert len(categories.dictionary) == len(set(categories.dictionary.to_pylist()))


@pytest.mark.parametrize("num_buckets", [1, 3, 50])
def test_every_event_of_a_user_lies_in_one_bucket_in_its_order(num_buckets: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    store = EventStore(tmp_path / "events", "user", num_buckets)
    rows = []
    for batch in range(4):
        users = [f"u{number}" for number in random.integers(0, 30, 25)]
        numbers = list(range(100 * batch, 100 * batch + 25))
        store.add(pa.table({"user": users, "number": numbers}))
        rows += zip(users, numbers, strict=True)
    store.close()
    found: dict[str, list[int]] = {}
    for bucket in range(num_buckets):
        events = store.read(bucket)
        here: dict[str, list[int]] = {}
        for row in [] if events is None else events.to_pylist():
            here.setdefault(row["user"], []).append(row["number"])
        assert not here.keys() & found.keys()
        found |= here
    assert found == {user: [number for other, number in rows if other == user] for user in {user for user, _ in rows}}


def test_number_of_buckets_grows_with_the_log_up_to_what_can_be_open_at_once() -> None:
    assert [buckets_for(events) for events in (0, 1, 1_000_000, 1_000_001, 10**12)] == [1, 1, 1, 2, 500]


def test_batches_hold_every_row_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    events = encoded(pa.chunked_array([[10, 11, 12]]))

    def rows(bucket: int) -> BucketRows | None:
        if bucket == 1:
            return None
        table = pa.table({"row": [4 * bucket + place for place in range(4)]})
        return BucketRows(table, History(np.array([0, 0, 1, 0]), np.array([0, 2, 3, 3]), {"past": events}))

    source = HistorySource(path, 3, rows, rows_per_batch=3)
    batches = [load() for load in source.batches()]
    assert [len(batch) for batch in batches] == [3, 1, 3, 1]
    assert [row for batch in batches for row in batch["past"].to_pylist()] == 2 * [[], [10, 11], [11, 12], [10, 11, 12]]
    assert [row for batch in batches for row in batch["row"].to_pylist()] == [0, 1, 2, 3, 8, 9, 10, 11]


def test_scratch_is_removed_and_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    with staged(tmp_path / "out", overwrite=False) as (scratch, encoded_folder):
        (scratch / "events").write_text("x")
        encoded_folder.mkdir()
        (encoded_folder / "manifest.json").write_text("{}")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "other", overwrite=False) as (scratch, _):
        (scratch / "events").write_text("x")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
