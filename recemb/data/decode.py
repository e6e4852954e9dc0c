"""Reads the row groups of a window, checks them and puts their rows in their final order.

Shapes: N rows read (whole row groups), R rows of the window (those of N that belong to this rank), L entries of lists.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.utils.dlpack

from recemb.data.columns import ADVICE, Column, Locate, check_list_ids, check_no_nulls, check_values
from recemb.data.row_groups import RowGroup, Segment, Window, open_parquet
from recemb.data.window import BagBlock, IdBlock, Layout, WindowBuffers

# Columns are decoded a few at a time, so that they are gathered while they still lie in the cache: measured best at
# 2 MiB of a core's cache, 1.1x faster than at 8 MiB. It also bounds the memory of decoding.
BYTES_PER_READ = 1 << 21
OPEN_FILES = 16
# The row of the read that comes at every place of the window: (R,) int32, or a range.
Order = np.ndarray | slice


@dataclass(frozen=True)
class _Read:
    """Row groups of one file that are read together; they are rows ``first`` and on of the window's read."""

    path: Path
    row_groups: tuple[RowGroup, ...]
    first: int

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)


class WindowReader:
    """Fills buffers with the rows of a window.

    Args:
        paths: the files of the split; ``RowGroup.file`` is a position among them.
        layout: what goes where.
    """

    def __init__(self, paths: Sequence[Path], layout: Layout) -> None:
        self._paths = paths
        self._layout = layout
        known = {column.name for column in layout.columns}
        self._columns = [*layout.columns, *(Column(name, "extra") for name in layout.extra if name not in known)]
        self._numeric_rows = {name: row for row, name in enumerate(layout.numeric)}
        self._files: dict[int, pq.ParquetFile] = {}

    def fill(self, buffers: WindowBuffers, window: Window, mix: np.ndarray | None) -> None:
        """Read ``window`` into ``buffers``.

        Args:
            mix: (R,) int32, the row of the window that comes at each place; None keeps the order.

        Raises:
            ValueError: a value, a type or a file that breaks the format, with its place.
            FileNotFoundError: a file that went away.
        """
        # Rows of one file are read by one call; where they are mixed anyway their order in the window is free.
        segments = window.segments if mix is None else sorted(window.segments, key=_position)
        reads = self._reads(segments)
        order = _order(segments, mix)
        num_columns = max(1, BYTES_PER_READ // (4 * sum(read.rows for read in reads)))
        for first in range(0, len(self._columns), num_columns):
            columns = self._columns[first : first + num_columns]
            tables = [self._read(read, columns) for read in reads]
            for column in columns:
                arrays = [_one_chunk(table.column(column.name)) for table in tables]
                for array, read in zip(arrays, reads, strict=True):
                    check_no_nulls(array, _locator(read, column.name))
                self._store(buffers, column, arrays, reads, order)
        buffers.rows, buffers.first_row = window.rows, window.first_row

    def _reads(self, segments: Sequence[Segment]) -> list[_Read]:
        reads: list[_Read] = []
        first = 0
        for number, group in itertools.groupby(segments, key=lambda segment: segment.row_group.file):
            read = _Read(self._paths[number], tuple(segment.row_group for segment in group), first)
            reads.append(read)
            first += read.rows
        return reads

    def _read(self, read: _Read, columns: Sequence[Column]) -> pa.Table:
        file = self._open(read.row_groups[0].file)
        names = [column.name for column in columns]
        numbers = [group.index for group in read.row_groups]
        try:
            table = file.read_row_groups(numbers, columns=names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{read.path}: {_first_damage(file, numbers, names)}: cannot be decoded, "
                f"the file is damaged ({error}); {ADVICE}"
            ) from error
        if table.num_rows != read.rows:
            raise ValueError(f"{read.path}: row groups {numbers} must hold {read.rows} rows, got {table.num_rows}")
        return table

    def _open(self, number: int) -> pq.ParquetFile:
        if number not in self._files:
            if len(self._files) == OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[number] = open_parquet(self._paths[number])
        return self._files[number]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _store(
        self,
        buffers: WindowBuffers,
        column: Column,
        arrays: Sequence[pa.Array],
        reads: Sequence[_Read],
        order: Order,
    ) -> None:
        if column.role == "jagged":
            _store_bags(buffers, self._layout, column, arrays, reads, order)
            return
        if column.role == "extra" or column.name in self._layout.extra:
            values_N = np.concatenate([array.to_numpy(zero_copy_only=False) for array in arrays])
            buffers.extra[column.name] = values_N[order]
        if column.role == "extra":
            return
        for array, read in zip(arrays, reads, strict=True):
            check_values(column, _values(array), _locator(read, column.name))
        rows = _order_rows(order)
        if column.role == "label":
            target = buffers.labels_R[:rows]
        elif column.role == "numeric":
            target = buffers.numeric_IR[self._numeric_rows[column.name], :rows]
        else:
            number, row = self._layout.places[column.name]
            block = buffers.blocks[number]
            assert isinstance(block, IdBlock)
            target = block.ids_FR[row, :rows]
        _put(arrays[0] if len(arrays) == 1 else pa.concat_arrays(arrays), order, target)


def _first_damage(file: pq.ParquetFile, numbers: Sequence[int], names: Sequence[str]) -> str:
    """The first row group and column that cannot be decoded, of some of which one cannot."""
    for number, name in itertools.product(numbers, names):
        try:
            file.read_row_group(number, columns=[name], use_threads=False)
        except (pa.ArrowException, OSError):
            return f"row group {number}, column {name!r}"
    return f"row groups {list(numbers)}, columns {list(names)}"


def _store_bags(
    buffers: WindowBuffers,
    layout: Layout,
    column: Column,
    arrays: Sequence[pa.Array],
    reads: Sequence[_Read],
    order: Order,
) -> None:
    starts: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    values: list[np.ndarray] = []
    entries = 0
    for array, read in zip(arrays, reads, strict=True):
        offsets = _values(array.offsets).astype(np.int64)
        locate = _locator(read, column.name)
        ids = array.values.slice(offsets[0], offsets[-1] - offsets[0])
        offsets -= offsets[0]
        if ids.null_count:
            entry = int(np.argmax(ids.is_null().to_numpy(zero_copy_only=False)))
            row = int(np.searchsorted(offsets[:-1], entry, side="right")) - 1
            raise ValueError(f"{locate(row)}, entry {entry - offsets[row]}: must not be null, got null; {ADVICE}")
        ids_L = _values(ids)
        check_list_ids(column, ids_L, offsets[:-1], locate)
        starts.append(offsets[:-1] + entries)
        ends.append(offsets[1:] + entries)
        values.append(ids_L)
        entries += len(ids_L)
    ends_N = np.concatenate(ends)
    starts_N = np.concatenate(starts)
    if column.max_length is not None:
        # Oldest to newest: the latest entries are the last ones.
        np.maximum(starts_N, ends_N - column.max_length, out=starts_N)
    block = buffers.blocks[layout.places[column.name][0]]
    assert isinstance(block, BagBlock)
    rows = _order_rows(order)
    block.starts_R[:rows] = starts_N[order]
    block.lengths_R[:rows] = (ends_N - starts_N)[order]
    block.values_L = values[0] if len(values) == 1 else np.concatenate(values)


def _position(segment: Segment) -> tuple[int, int]:
    return segment.row_group.file, segment.row_group.index


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _order(segments: Sequence[Segment], mix: np.ndarray | None) -> Order:
    """Which of the N rows read come at each of the R places; a share may begin inside a row group, read whole."""
    begins = itertools.accumulate((segment.row_group.rows for segment in segments), initial=0)
    ranges = [(begin + segment.start, begin + segment.stop) for begin, segment in zip(begins, segments, strict=False)]
    first = ranges[0][0]
    if all(left[1] == right[0] for left, right in itertools.pairwise(ranges)):
        if mix is None:
            return slice(first, ranges[-1][1])
        return mix + first if first else mix
    rows_R = np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in ranges])
    return rows_R if mix is None else rows_R[mix]


def _order_rows(order: Order) -> int:
    return order.stop - order.start if isinstance(order, slice) else len(order)


def _values(array: pa.Array) -> np.ndarray:
    """The numbers of an array without nulls, not copied. Array.to_numpy would import pandas, 40 MB, for nothing."""
    return np.from_dlpack(array)


def _put(values: pa.Array, order: Order, out_R: np.ndarray) -> None:
    """Write fixed-width values into ``out_R`` in order."""
    source_N = _values(values)
    if isinstance(order, slice) or source_N.dtype != out_R.dtype:
        out_R[:] = source_N[order]
        return
    # Of the gathers of numpy, Arrow and torch the fastest that writes in place, and the one-dimensional one is serial:
    # a parallel operation here would start OpenMP threads of this thread's own, beside those that train.
    # DLPack, because torch.from_numpy warns about Arrow's memory being read-only.
    source = torch.utils.dlpack.from_dlpack(values)
    torch.index_select(source, 0, torch.from_numpy(order), out=torch.from_numpy(out_R))


def _locator(read: _Read, column: str) -> Locate:
    def locate(row: int) -> str:
        position = row
        for group in read.row_groups:
            if position < group.rows:
                return (
                    f"{read.path}: row group {group.index}, column {column!r}, row {position} "
                    f"(row {group.first_row + position} of the file)"
                )
            position -= group.rows
        raise AssertionError(f"row {row} of {read.rows}")

    return locate
