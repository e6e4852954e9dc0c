"""Finds rows of one split that were copied to another, whatever the compression, encoding or order of the copy.

Three things are compared between splits: row groups, files and whole splits. Two of them that have as many rows and, in
every column, the same least and greatest value are candidates; the footers tell that, so an honest data set costs no
reading. Candidates are read and compared by the sum of a 64-bit hash of each row, which does not depend on the order.

What this finds: a row group, a file or a split that holds exactly the rows of one in another split. What it does not: a
copy with other columns or types, or of which only one has statistics; some rows copied among others. Counting the rows
that occur in both splits would find the last, but would condemn honest logs: two impressions may agree in all columns,
and in logs of few columns most do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from recemb.data.manifest import Manifest

# Chance makes two small or monotonous pieces equal: pieces with fewer different rows than this are never reported.
LEAST_DISTINCT_ROWS = 64
# Rows, then (column, least, greatest) of each.
Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Piece:
    """Row groups that are compared as one: (file, row group) numbers of a split."""

    split: str
    name: str
    row_groups: tuple[tuple[int, int], ...]


def check_no_overlap(manifest: Manifest) -> None:
    """Check that no row group, file or split holds exactly the rows of one in another split.

    Raises:
        ValueError: naming both.
    """
    candidates: dict[Key, list[_Piece]] = {}
    for split in manifest.splits:
        for key, piece in _pieces(manifest, split):
            if not key[0]:
                continue
            candidates.setdefault(key, []).append(piece)
    for alike in candidates.values():
        if len({piece.split for piece in alike}) > 1:
            _compare(manifest, alike)


def _compare(manifest: Manifest, alike: Sequence[_Piece]) -> None:
    seen: dict[int, _Piece] = {}
    for piece in alike:
        hashes = _row_hashes(manifest, piece)
        if len(np.unique(hashes)) < LEAST_DISTINCT_ROWS:
            return
        other = seen.setdefault(int(hashes.sum(dtype=np.uint64)), piece)
        if other.split != piece.split:
            raise ValueError(
                f"{piece.name} of split {piece.split!r} holds the same {len(hashes)} rows as {other.name} of split "
                f"{other.split!r}; a validation or test row must never be trained on: split the log again"
            )


def _pieces(manifest: Manifest, split: str) -> Iterator[tuple[Key, _Piece]]:
    """Row groups, files and the whole split, with what the footers say of them."""
    of_files: list[list[Key]] = []
    row_groups: list[tuple[int, int]] = []
    for number, path in enumerate(manifest.files(split)):
        with pq.ParquetFile(path) as file:
            keys = [_key(file.metadata.row_group(index)) for index in range(file.metadata.num_row_groups)]
        own = [(number, index) for index in range(len(keys))]
        for key, (_, index) in zip(keys, own, strict=True):
            yield key, _Piece(split, f"{path}, row group {index},", ((number, index),))
        if len(keys) != 1:
            yield _joined(keys), _Piece(split, str(path), tuple(own))
        of_files.append(keys)
        row_groups += own
    if len(of_files) != 1:
        yield _joined([key for keys in of_files for key in keys]), _Piece(split, "the whole", tuple(row_groups))


def _key(row_group: pq.RowGroupMetaData) -> Key:
    columns = []
    for position in range(row_group.num_columns):
        column = row_group.column(position)
        statistics = column.statistics
        # Bounds of strings are left out: writers cut them at different lengths.
        is_number = column.physical_type in ("INT32", "INT64", "FLOAT", "DOUBLE")
        has_bounds = is_number and statistics is not None and statistics.has_min_max
        bounds = (statistics.min, statistics.max) if has_bounds else (None, None)
        columns.append((column.path_in_schema, *bounds))
    return (row_group.num_rows, *sorted(columns, key=lambda column: column[0]))


def _joined(keys: Sequence[Key]) -> Key:
    """The key that the row groups would have if they were one."""
    columns = []
    for parts in zip(*(key[1:] for key in keys), strict=True):
        lows = [low for _, low, _ in parts]
        highs = [high for _, _, high in parts]
        unknown = None in lows
        columns.append((parts[0][0], None if unknown else min(lows), None if unknown else max(highs)))
    return (sum(key[0] for key in keys), *columns)


def _row_hashes(manifest: Manifest, piece: _Piece) -> np.ndarray:
    """(rows,) uint64, equal for equal rows; reads one row group at a time."""
    # Here, because it costs a tenth of a second and tens of megabytes that only look-alikes need.
    import polars

    paths = manifest.files(piece.split)
    hashes = []
    for number, index in piece.row_groups:
        with pq.ParquetFile(paths[number]) as file:
            table: pa.Table = file.read_row_group(index)
        frame = polars.from_arrow(table.select(sorted(table.column_names)))
        assert isinstance(frame, polars.DataFrame)
        hashes.append(frame.hash_rows(seed=0).to_numpy())
    return np.concatenate(hashes)
