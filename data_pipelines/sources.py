"""Raw log files as a stream of batches, with the place of every row known.

A source is checked before the first row of any source is read (``check``): it is there, it is what it says, it has
the columns, and they have the types. What only shows while reading (a broken line, a damaged page) is raised with its
place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.schema import Requirement

# Rows of one batch: the unit of parallel work. Memory of a preparation is proportional to it; below about 50,000 rows
# the per-column overhead shows.
BATCH_ROWS = 131_072
PARQUET_MAGIC = b"PAR1"

_REQUIRED_TYPES: dict[Requirement, str] = {
    "label": "integer, boolean or float (0 or 1)",
    "numeric": "integer or float",
    "category": "string or integer",
    "ids": "integer",
    "list": "list of strings or integers",
    "id list": "list of integers",
    "times": "list of integers, dates or timestamps",
    "time": "integer, date or timestamp",
    "day": "integer",
    "any": "integer, float, boolean, string, date or timestamp",
}


# A batch of rows that is not parsed yet; workers call it.
LazyBatch = Callable[[], pa.Table]


class RowError(ValueError):
    """A row of a batch is wrong.

    Args:
        row: its number in the batch; whoever knows where the batch begins says where that is.
        message: what is wrong, beginning with the column.
    """

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


class Source(Protocol):
    """One raw file."""

    @property
    def path(self) -> Path:
        """The file."""

    def check(self) -> None:
        """Raise FileNotFoundError or ValueError when the file cannot be what is asked for."""

    def batches(self) -> Iterator[LazyBatch]:
        """Its rows in order."""

    def place(self, row: int) -> str:
        """Where row ``row`` (from 0) is, in words."""


@dataclass(frozen=True)
class ParquetFile:
    """A Parquet file.

    Args:
        path: the file.
        required: columns to read (names that come out) and what they hold.
        renamed: name that comes out -> name in the file, for those that differ.
    """

    path: Path
    required: Mapping[str, Requirement]
    renamed: Mapping[str, str]

    def check(self) -> None:
        schema = open_parquet(self.path).schema_arrow
        for name, kind in self.required.items():
            stored = self.renamed.get(name, name)
            indices = schema.get_all_field_indices(stored)
            if len(indices) != 1:
                problem = "is missing" if not indices else "occurs more than once"
                raise ValueError(f"{self.path}: column {stored!r} {problem}; the file has {schema.names}")
            found = schema.field(indices[0]).type
            if not is_acceptable(found, kind):
                raise ValueError(f"{self.path}: column {stored!r} must be {_REQUIRED_TYPES[kind]}, got {found}")

    def batches(self) -> Iterator[LazyBatch]:
        """Its rows in order, decoded by Arrow's threads, a column each."""
        file = open_parquet(self.path)
        stored = [self.renamed.get(name, name) for name in self.required]
        for group in range(file.num_row_groups):
            try:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=stored):
                    columns = {name: batch.column(old) for name, old in zip(self.required, stored, strict=True)}
                    yield partial(pa.table, columns)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{self.path}: row group {group} is damaged ({error}); get the file again") from error

    def place(self, row: int) -> str:
        metadata = open_parquet(self.path).metadata
        end = 0
        for group in range(metadata.num_row_groups):
            end += metadata.row_group(group).num_rows
            if row < end:
                return f"{self.path}: row group {group}, row {row}"
        return f"{self.path}: row {row}"

    @property
    def column_names(self) -> set[str]:
        """Names in the file."""
        return set(open_parquet(self.path).schema_arrow.names)


def contiguous(table: pa.Table) -> pa.RecordBatch:
    """One array a column, text as a dictionary of the distinct values of all the table's rows."""
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            # Encoding the chunks together gives one dictionary, and the text is never copied.
            column = column.dictionary_encode()
        columns[name] = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return pa.RecordBatch.from_pydict(columns)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file; FileNotFoundError or ValueError with the file's name when that fails."""
    check_exists(path)
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        size = path.stat().st_size
        raise ValueError(f"{path}: not a readable Parquet file, truncated? ({size} bytes; {error})") from error


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet, by its first bytes (by its name when it is too short to tell)."""
    check_exists(path)
    with path.open("rb") as stream:
        return stream.read(4) == PARQUET_MAGIC or path.suffix in (".parquet", ".pq")


def is_acceptable(found: pa.DataType, kind: Requirement) -> bool:
    """Whether a column of type ``found`` can serve as ``kind``."""
    types = pa.types
    of_entries: dict[Requirement, Requirement] = {"list": "category", "id list": "ids", "times": "time"}
    if kind in of_entries:
        is_list = types.is_list(found) or types.is_large_list(found)
        return is_list and is_acceptable(found.value_type, of_entries[kind])
    if types.is_dictionary(found):
        return kind in ("category", "any") and is_acceptable(found.value_type, kind)
    integer = types.is_integer(found)
    text = types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)
    moment = types.is_timestamp(found) or types.is_date(found)
    number = integer or types.is_floating(found)
    return {
        "label": number or types.is_boolean(found),
        "numeric": number,
        "category": integer or text,
        "ids": integer,
        "time": integer or moment,
        "day": integer,
        "any": number or text or moment or types.is_boolean(found),
    }[kind]


def check_distinct(paths: Sequence[Path]) -> None:
    """Raise ValueError when no file is given, or one twice: its rows would be trained on and tested."""
    if not paths:
        raise ValueError("no raw file given")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"{path}: given twice; its rows would be in train and in test")
        seen.add(path.resolve())


def check_days_ascend(paths: Sequence[Path]) -> None:
    """Raise ValueError when numbered files come in a shell's alphabetic order: day_10 before day_2."""
    names = [path.name for path in paths]
    natural = sorted(names, key=_natural_key)
    if names == sorted(names) and names != natural:
        raise ValueError(
            f"{paths[0].parent}: files are taken in the order given, oldest first, and {names[:4]}... is alphabetic; "
            f"the numbers in the names say {natural[:4]}... Give them in that order (e.g. with `ls -v`)"
        )


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    parts: list[str] = [""]
    for character in name:
        if parts[-1] and character.isdigit() == parts[-1][-1].isdigit():
            parts[-1] += character
        else:
            parts.append(character)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def check_exists(path: Path) -> None:
    """Raise FileNotFoundError or, for a directory, ValueError."""
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; name the raw files themselves")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")


@dataclass(frozen=True)
class Renamed:
    """A source whose columns come out under other names.

    Args:
        source: the file.
        stored: name that comes out -> name in the file.
    """

    source: Source
    stored: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.source.path

    def check(self) -> None:
        self.source.check()

    def place(self, row: int) -> str:
        return self.source.place(row)

    def batches(self) -> Iterator[LazyBatch]:
        return (partial(_select, load, self.stored) for load in self.source.batches())


def _select(load: LazyBatch, stored: Mapping[str, str]) -> pa.Table:
    table = load()
    return pa.table({new: table[old] for new, old in stored.items()})
