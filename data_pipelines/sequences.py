"""Histories that come ready made: what can be wrong with them, found before a model learns the future.

Shapes: N rows of a batch, L entries of all its lists.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipelines.schema import CategoricalColumn, LogSchema
from data_pipelines.sources import RowError
from data_pipelines.transforms import moments_of


def check_sequences(raw: pa.RecordBatch, schema: LogSchema) -> None:
    """Check the histories of a batch of raw rows.

    Raises:
        RowError: a list is null, parallel ones differ in length, or times are null, do not ascend or are not before the
            row's own.
    """
    first: dict[str, tuple[str, npt.NDArray[np.int64]]] = {}
    for column in schema.sequences:
        lengths = _lengths(raw, column.name)
        name, expected = first.setdefault(column.events, (column.name, lengths))
        if (wrong := lengths != expected).any():
            row = int(wrong.argmax())
            raise RowError(
                row,
                f"column {column.name!r}: as many entries as in {name!r} are required, which describes the same events "
                f"{column.events!r} ({expected[row]}), got {lengths[row]}",
            )
        if column.times is not None:
            assert schema.time is not None
            _check_times(raw, column, lengths, schema.time, schema.time_unit)


def _lengths(raw: pa.RecordBatch, name: str) -> npt.NDArray[np.int64]:
    lists = raw.column(name)
    if lists.null_count:
        row = lists.is_null().index(True).as_py()
        raise RowError(row, f"column {name!r}: a list is required (an empty history is an empty list), got null")
    return np.asarray(lists.value_lengths().to_numpy(zero_copy_only=False), np.int64)


def _check_times(
    raw: pa.RecordBatch, column: CategoricalColumn, lengths: npt.NDArray[np.int64], time: str, unit: str
) -> None:
    assert column.times is not None
    name = column.times
    if ((counts := _lengths(raw, name)) != lengths).any():
        row = int((counts != lengths).argmax())
        raise RowError(
            row, f"column {name!r}: a time for each entry of {column.name!r} ({lengths[row]}), got {counts[row]}"
        )
    entries = raw.column(name).flatten()
    rows = np.repeat(np.arange(len(lengths)), lengths)
    if entries.null_count:
        row = int(rows[entries.is_null().index(True).as_py()])
        raise RowError(row, f"column {name!r}: no null times, got {raw.column(name)[row].as_py()}")
    if _is_plain(entries.type) != _is_plain(raw.column(time).type):
        raise RowError(
            0, f"column {name!r}: times of the kind of {time!r} ({raw.column(time).type}), got {entries.type}"
        )
    moments = moments_of(entries, unit)[0]
    own = moments_of(raw.column(time), unit)[0][rows]
    if (late := moments >= own).any():
        entry = int(late.argmax())
        row = int(rows[entry])
        raise RowError(
            row,
            f"column {name!r}: every event of a history must be before the row's own ({time!r}: "
            f"{raw.column(time)[row].as_py()}), got {entries[entry].as_py()}: the row's own event or the future",
        )
    falls = (np.diff(moments) < 0) & (np.diff(rows) == 0)
    if falls.any():
        row = int(rows[int(falls.argmax())])
        raise RowError(
            row, f"column {name!r}: oldest to newest is required, got {raw.column(name)[row].as_py()}, not sorted"
        )


def _is_plain(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind))
