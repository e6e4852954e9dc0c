"""From raw values to ids, without holding the log.

Values get *provisional* ids in order of arrival while the log is read once (train, validation and test rows alike,
which decides nothing), the train rows among them are counted, and the counts decide the final ids: 0 for whatever has
no id of its own, then 1.. by descending train count, ties by value. Provisional order depends on threads, final ids do
not.

Memory: about 120 bytes for each distinct value of the log (of 8 characters), whatever the number of rows.

Shapes: N rows, V distinct values of a table (with missing), K ids.
"""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

OUT_OF_VOCABULARY = 0
# Provisional id of a missing value; the others follow.
_MISSING = 0
_LARGEST_PROVISIONAL = 2**31 - 2

Ids = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]


class ValueIndex:
    """Provisional ids of one table's values. Safe to call from several threads.

    Polars' categories are the hash table: of those measured (a Python dict, pandas, DuckDB joins) the only one that
    grows in place, takes Arrow strings without making Python objects and works outside the interpreter lock.
    """

    def __init__(self) -> None:
        self._categories = pl.Categories.random()
        # Polars forgets a mapping that no column refers to; this one keeps it.
        self._anchor = pl.Series([], dtype=pl.Categorical(self._categories))
        self._value_type: pa.DataType | None = None
        self._largest = _MISSING
        self._lock = threading.Lock()

    def provisional_ids(self, column: pa.Array) -> Ids:
        """(N,) strings, integers or dictionaries of them -> (N,) int32.

        Only the batch's distinct values, about a tenth of the cells of a click log, reach the hash table.
        """
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        values = encoded.dictionary
        self._check_type(values.type)
        texts = pl.Series(values=values.cast(pa.large_string()), dtype=pl.String)
        known = texts.cast(pl.Categorical(self._categories)).to_physical().fill_null(0).to_numpy()
        largest = int(known.max()) + 1 if len(known) else _MISSING
        if largest > _LARGEST_PROVISIONAL:
            raise ValueError(f"more than {_LARGEST_PROVISIONAL} distinct values; use encoding 'hash' for such a column")
        with self._lock:
            self._largest = max(self._largest, largest)
        # A missing value's index is one past the dictionary, which picks the last entry.
        lookup = np.append(known.astype(np.int32) + 1, np.int32(_MISSING))
        if values.null_count:
            lookup[:-1][values.is_null().to_numpy(zero_copy_only=False)] = _MISSING
        indices = encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)
        return np.take(lookup, indices, mode="clip")  # Half the time of lookup[indices], which checks bounds first.

    def _check_type(self, found: pa.DataType) -> None:
        kind = pa.uint64() if pa.types.is_uint64(found) else pa.int64() if pa.types.is_integer(found) else pa.string()
        known = self._value_type = self._value_type or kind
        if known != kind:
            raise ValueError(f"values of one table must be all {known} or all {kind}, got both")

    def __len__(self) -> int:
        """V, with the missing value."""
        return self._largest + 1

    def values(self, provisional: Ids) -> pa.Array:
        """(K,) provisional ids -> (K,) raw values. Only these texts are copied out of the hash table."""
        known = pl.Series(values=provisional[provisional != _MISSING] - 1, dtype=pl.UInt32)
        texts = known.cat.to(pl.Categorical(self._categories)).cast(pl.String).to_arrow()
        typed = texts.cast(pa.string()).cast(self._value_type or pa.string())
        places = np.cumsum(provisional != _MISSING) - 1
        return typed.take(pa.array(places, mask=provisional == _MISSING))


class TrainCounter:
    """Counts provisional ids of train rows."""

    def __init__(self, num_values: int) -> None:
        self._counts: Counts = np.zeros(num_values, np.int64)

    def add(self, ids: Ids) -> None:
        """Count (N,) ids."""
        # bincount makes an array of all values each time: cheap only while they are not many more than the rows.
        if len(self._counts) <= 2 * len(ids):
            self._counts += np.bincount(ids, minlength=len(self._counts))
        else:
            np.add.at(self._counts, ids, 1)

    @property
    def counts(self) -> Counts:
        """(V,) occurrences in train by provisional id."""
        return self._counts


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one table.

    Args:
        values: (K,) raw value of every id; null for id 0, and for the id of missing values where it has one. None after
            they were saved: only the ids are needed to write the splits.
        train_counts: (K,) int64 occurrences in train; id 0 counts all that share it.
        remap: (V,) int32 provisional id -> id.
    """

    values: pa.Array | None
    train_counts: Counts
    remap: Ids

    def __len__(self) -> int:
        return len(self.train_counts)

    def save(self, path: Path) -> None:
        """Write ``value`` and ``train_count``, row i for id i."""
        path.parent.mkdir(exist_ok=True)
        table = pa.table({"value": self.values, "train_count": self.train_counts})
        pq.write_table(table, path, compression="zstd")

    def without_values(self) -> Vocabulary:
        """The same ids, the texts freed."""
        return dataclasses.replace(self, values=None)


def rank(index: ValueIndex, counts: Counts, min_count: int) -> Vocabulary:
    """Give final ids to the values of ``index``, whose (V,) counts in train are known.

    A value seen at least ``min_count`` times in train gets an id of its own, in order of descending count, then value
    (missing first, text by bytes, integers by size). Everything else is id 0.
    """
    kept = np.flatnonzero(counts >= max(min_count, 1)).astype(np.int32)
    values = index.values(kept)
    frame = pl.DataFrame({"count": counts[kept], "value": pl.Series(values=values)}).with_row_index("position")
    frame = frame.sort(["count", "value"], descending=[True, False], nulls_last=False)
    order = frame["position"].to_numpy()
    remap = np.full(len(counts), OUT_OF_VOCABULARY, np.int32)
    remap[kept[order]] = np.arange(1, len(kept) + 1, dtype=np.int32)
    known = frame["count"].to_numpy()
    return Vocabulary(
        values=pa.concat_arrays([pa.nulls(1, values.type), values.take(pa.array(order))]),
        train_counts=np.concatenate([[counts.sum() - known.sum()], known]).astype(np.int64),
        remap=remap,
    )
