"""Checks of a split before training starts, from footers and statistics: no data is read unless they show a fault.

The loader checks every value as it reads it; a bad id in the last file would then show hours late. The statistics that
Parquet keeps for each row group bound the ids, labels and numeric values of the split in milliseconds.
"""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq

from recemb.data.columns import Column, check_schema, model_columns
from recemb.data.decode import WindowReader
from recemb.data.manifest import Manifest
from recemb.data.row_groups import RowGroup, Segment, Window, check_row_count, open_parquet, row_groups_of
from recemb.data.window import WindowBuffers, make_layout


def check_split(manifest: Manifest, split: str) -> None:
    """Check files, schema and, where the files have them, statistics of a split.

    Finds: missing and truncated files, files of another size or row count than the manifest says, columns missing or of
    another type, null values in single columns, ids and labels out of range, infinities. A row group whose statistics
    show a fault is read, so that the error names the row. Does not find: NaN (statistics leave it out), nulls inside of
    lists (they count empty lists as well), anything in files without statistics; the loader finds those.

    Raises:
        FileNotFoundError, ValueError: naming the file and, for values, row group, column and row.
    """
    columns = model_columns(manifest)
    manifest.verify_split(split)
    for number, path in enumerate(manifest.files(split)):
        with open_parquet(path) as file:
            check_row_count(manifest, split, number, file)
            check_schema(file.schema_arrow, columns, path)
            leaves = _leaves(file)
            for group in row_groups_of(file, number):
                for column in columns:
                    statistics = file.metadata.row_group(group.index).column(leaves[column.name]).statistics
                    if statistics is not None and not _keeps_rule(column, statistics):
                        _read_one(manifest, split, path, column, group)


def _leaves(file: pq.ParquetFile) -> dict[str, int]:
    """Position of the first leaf of every top-level column."""
    leaves: dict[str, int] = {}
    for position in range(len(file.schema)):
        column = file.schema.column(position)
        # "name" for a flat column, "name.list.element" for a list; a flat name may hold dots itself.
        top = column.path if column.max_repetition_level == 0 else column.path.rsplit(".", 2)[0]
        leaves.setdefault(top, position)
    return leaves


def _keeps_rule(column: Column, statistics: pq.Statistics) -> bool:
    if column.role != "jagged" and statistics.has_null_count and statistics.null_count:
        return False
    if not statistics.has_min_max:
        return True
    low, high = statistics.min, statistics.max
    if column.role == "numeric":
        return math.isfinite(low) and math.isfinite(high)
    if column.role == "label":
        return low >= 0 and high <= 1
    return low >= 0 and (column.num_embeddings is None or high < column.num_embeddings)


def _read_one(manifest: Manifest, split: str, path: Path, column: Column, group: RowGroup) -> None:
    """Read one column of one row group: its check names the row. Statistics that merely lie pass."""
    layout = make_layout([column], frozenset([column.name]), ())
    reader = WindowReader(manifest.files(split), layout)
    window = Window(0, 0, 0, group.rows, (Segment(group, 0, group.rows),))
    try:
        reader.fill(WindowBuffers(layout, group.rows), window, None)
    finally:
        reader.close()
