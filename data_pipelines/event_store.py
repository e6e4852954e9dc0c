"""Events on disk, every user's in one bucket: memory of making histories is that of a bucket, not of the log.

Shapes: N events of a batch, B buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines.hashing import hash_values
from data_pipelines.sources import RowError, Source, is_parquet, open_parquet
from data_pipelines.splitting import mix

# A bucket of a million events of five columns takes 40 MB, and five times that while its histories are made.
EVENTS_PER_BUCKET = 1_000_000
# Every bucket is an open file while events arrive.
MOST_BUCKETS = 500


class EventStore:
    """Writes events into B files by a hash of their user; reads one file at a time.

    Args:
        folder: to make; whoever made its parent removes it.
        user: column of users (integers or strings). Stores of one B put a user into buckets of one number.
        num_buckets: B; see ``buckets_for``.
    """

    def __init__(self, folder: Path, user: str, num_buckets: int) -> None:
        folder.mkdir()
        self.num_buckets = num_buckets
        self._folder = folder
        self._user = user
        self._writers: dict[int, pa.RecordBatchStreamWriter] = {}
        self._schema: pa.Schema | None = None

    def add(self, events: pa.Table) -> None:
        """Append N events; they keep their order within a bucket."""
        batch = pa.RecordBatch.from_pydict(
            {name: _one(column) for name, column in zip(events.column_names, events.columns, strict=True)}
        )
        self._schema = self._schema or batch.schema
        users = batch.column(self._user)
        # Mixed once more, so that buckets and splits by users are independent.
        hashes = mix(hash_values(users).view(np.uint64))
        buckets = (hashes % np.uint64(self.num_buckets)).astype(np.int64)
        order = np.argsort(buckets, kind="stable")
        ends = np.cumsum(np.bincount(buckets, minlength=self.num_buckets))
        sorted_batch = batch.take(pa.array(order))
        for bucket in np.flatnonzero(np.diff(ends, prepend=0)).tolist():
            start = int(ends[bucket - 1]) if bucket else 0
            self._writer(bucket).write_batch(sorted_batch.slice(start, int(ends[bucket]) - start))

    def _writer(self, bucket: int) -> pa.RecordBatchStreamWriter:
        if bucket not in self._writers:
            assert self._schema is not None
            self._writers[bucket] = pa.ipc.new_stream(str(self._path(bucket)), self._schema)
        return self._writers[bucket]

    def close(self) -> None:
        """All events are there; buckets can be read."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def read(self, bucket: int) -> pa.Table | None:
        """The events of one bucket in order of arrival, None when it has none."""
        path = self._path(bucket)
        if not path.exists():
            return None
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
            return reader.read_all().combine_chunks()

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket:04}.arrows"


def _one(column: pa.ChunkedArray) -> pa.Array:
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def buckets_for(num_events: int) -> int:
    """Buckets of about EVENTS_PER_BUCKET events, at most MOST_BUCKETS."""
    return min(max(1, -(-num_events // EVENTS_PER_BUCKET)), MOST_BUCKETS)


def estimated_rows(path: Path, bytes_per_row: int) -> int:
    """Rows of a raw file, exactly where it says so (Parquet), else by its size; text in gzip is four times as long."""
    if is_parquet(path):
        return int(open_parquet(path).metadata.num_rows)
    return path.stat().st_size * (4 if path.suffix == ".gz" else 1) // bytes_per_row


def read_checked(source: Source, check: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    """Batches of a raw file through ``check``, which makes events of them.

    Raises:
        ValueError: what ``check`` (a RowError) or the file's parser found, with the file and the line or row.
    """
    source.check()
    first_row = 0
    for load in source.batches():
        try:
            raw = load()
            yield check(raw)
        except RowError as error:
            raise ValueError(f"{source.place(first_row + error.row)}: {error}") from error
        first_row += len(raw)


def no_nulls(raw: pa.Table, names: list[str]) -> None:
    """Raise RowError where a column that must have a value has none."""
    for name in names:
        if raw[name].null_count:
            row = raw[name].combine_chunks().is_null().index(True).as_py()
            raise RowError(row, f"column {name!r}: a value is required in every row, got null")
