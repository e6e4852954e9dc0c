"""Rows with histories out of events, strictly from the past.

A history holds the latest ``max_history`` events of the row's user whose *moment* is smaller than the row's. Moments
are integers that a pipeline chooses: where they are times, events of one time know nothing of each other, and so is the
row's own event left out; where a log orders events of one time (a step within a session, a line number), the moment
says so. No history is made of anything else, so what is tested for this module holds for every pipeline.

Memory: one bucket of users (``event_store``) and the batches made of it.

Shapes: E events of a bucket, N rows (targets) of a bucket or batch, L entries of a batch's histories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipelines.sources import BATCH_ROWS, LazyBatch, check_exists

DEFAULT_MAX_HISTORY = 50
# Entries of one batch's longest possible histories: 16 MB a sequence.
_ENTRIES_PER_BATCH = 4_000_000

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class History:
    """Which events each row knows: entries [starts, ends) of the bucket's events.

    Args:
        starts, ends: (N,) int64.
        columns: sequence name -> (E,) the events' values.
    """

    starts: Int64
    ends: Int64
    columns: Mapping[str, pa.Array]


@dataclass(frozen=True)
class BucketRows:
    """The rows a pipeline makes of one bucket.

    Args:
        table: (N) everything but the sequences.
        history: None for a log without.
    """

    table: pa.Table
    history: History | None = None


def past(
    event_users: Int64, event_moments: Int64, target_users: Int64, target_moments: Int64, max_history: int
) -> tuple[Int64, Int64]:
    """Ranges of the events that targets know.

    Args:
        event_users, event_moments: (E,) sorted by user, then moment.
        target_users, target_moments: (N,) in any order.
        max_history: longest range; the latest events are kept.

    Returns:
        (N,) starts and ends: the events of the target's user with a moment strictly smaller than the target's.
    """
    # Moments take 64 bits, so (user, moment) is ranked before both are packed into one integer.
    moments, ranks = np.unique(np.concatenate([event_moments, target_moments]), return_inverse=True)
    event_keys = event_users * len(moments) + ranks[: len(event_moments)]
    target_keys = target_users * len(moments) + ranks[len(event_moments) :]
    ends = np.searchsorted(event_keys, target_keys, side="left")
    first = np.searchsorted(event_users, target_users, side="left")
    return np.maximum(first, ends - max_history).astype(np.int64), ends.astype(np.int64)


def user_numbers(*columns: pa.ChunkedArray) -> list[Int64]:
    """Columns of users -> for each (N,) int64, equal numbers for equal users, in order of first appearance."""
    together = pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)
    numbers = together.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return np.split(numbers, np.cumsum([len(column) for column in columns])[:-1])


def encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """(N,) values -> their dictionary; entries of histories are gathered as its 4-byte indices."""
    array = column.combine_chunks()
    return array if pa.types.is_dictionary(array.type) else array.dictionary_encode()


def recoded(column: pa.DictionaryArray, dictionary: pa.Array) -> pa.DictionaryArray:
    """The same indices into other values (an item's category in place of the item); repeated values are allowed."""
    # A dictionary must not repeat values for a reader that counts them, so indices are mapped to distinct ones.
    distinct = dictionary.dictionary_encode()
    return pa.DictionaryArray.from_arrays(distinct.indices.take(column.indices), distinct.dictionary)


def entries(starts: Int64, ends: Int64) -> tuple[npt.NDArray[np.int32], Int64]:
    """(N,) ranges -> (N + 1,) offsets and the (L,) positions that they hold."""
    lengths = ends - starts
    offsets = np.append(0, np.cumsum(lengths))
    positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return offsets.astype(np.int32), positions


@dataclass(frozen=True)
class HistorySource:
    """The rows of all buckets, as a source that ``pipeline.prepare_log`` encodes.

    Args:
        path: raw file the rows stem from, for messages.
        num_buckets: buckets 0 .. num_buckets - 1.
        build: number of a bucket -> its rows, None when it has none. Called once each, in order.
        rows_per_batch: N of a batch; see ``rows_per_batch``.
    """

    path: Path
    num_buckets: int
    build: Callable[[int], BucketRows | None]
    rows_per_batch: int = field(default=BATCH_ROWS)

    def check(self) -> None:
        """The raw file must be there; its content was checked when the buckets were filled."""
        check_exists(self.path)

    def batches(self) -> Iterator[LazyBatch]:
        """Rows bucket by bucket."""
        for bucket in range(self.num_buckets):
            rows = self.build(bucket)
            if rows is None:
                continue
            for first in range(0, len(rows.table), self.rows_per_batch):
                yield partial(_batch, rows, first, min(first + self.rows_per_batch, len(rows.table)))

    def place(self, row: int) -> str:
        """Rows are sorted by bucket, so only their number in the encoded log is left."""
        return f"{self.path}: row {row} of those made of it"


def rows_per_batch(max_history: int) -> int:
    """Rows whose longest possible histories fit into a batch's memory."""
    return min(BATCH_ROWS, max(1024, _ENTRIES_PER_BATCH // max_history))


def _batch(rows: BucketRows, first: int, last: int) -> pa.Table:
    table = rows.table.slice(first, last - first)
    if rows.history is None:
        return table
    offsets, positions = entries(rows.history.starts[first:last], rows.history.ends[first:last])
    for name, values in rows.history.columns.items():
        lists = pa.ListArray.from_arrays(pa.array(offsets), values.take(pa.array(positions)))
        table = table.append_column(name, lists)
    return table


def check_max_history(max_history: int) -> None:
    """Raise ValueError for a cap that keeps nothing."""
    if max_history < 1:
        raise ValueError(f"max_history must be at least 1 (events), got {max_history}")
