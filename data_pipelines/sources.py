"""Raw log files as a stream of Arrow record batches, with the place of every row known.

A source is checked before the first row of any source is read (``check``): it is there, it is what it says, it has
the columns, and they have the types. What only shows while reading (a broken line, a damaged page) is raised with its
place.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from data_pipelines.schema import Requirement

# Rows (Parquet) and bytes (text) of one batch: the unit of parallel work. Memory of a preparation is proportional to
# it; below about 50,000 rows the per-column overhead shows.
BATCH_ROWS = 131_072
BATCH_BYTES = 32 << 20
# Bytes of text parsed at once: a block that stays in the cache halves the processor time of parsing 32 MB at once.
BLOCK_BYTES = 1 << 20
PARQUET_MAGIC = b"PAR1"

_REQUIRED_TYPES: dict[Requirement, str] = {
    "label": "integer, boolean or float (0 or 1)",
    "numeric": "integer or float",
    "category": "string or integer",
    "ids": "integer",
    "list": "list of strings or integers",
    "id list": "list of integers",
    "time": "integer, date or timestamp",
    "day": "integer",
    "any": "integer, float, boolean, string, date or timestamp",
}


class Source(Protocol):
    """One raw file."""

    @property
    def path(self) -> Path:
        """The file."""

    def check(self) -> None:
        """Raise FileNotFoundError or ValueError when the file cannot be what is asked for."""

    def batches(self) -> Iterator[pa.Table]:
        """Its rows in order; ``contiguous`` makes a batch of each."""

    def place(self, row: int) -> str:
        """Where row ``row`` (from 0) is, in words."""


@dataclass(frozen=True)
class DelimitedFile:
    """A text file with one row a line, plain or gzip (name ends in .gz). An empty cell is a missing value.

    Args:
        path: the file.
        columns: all names in file order; ignored when there is a header.
        required: columns to read and what they hold.
        delimiter: one character.
        header: whether the first line holds names.
    """

    path: Path
    columns: tuple[str, ...]
    required: Mapping[str, Requirement]
    delimiter: str = "\t"
    header: bool = False

    def check(self) -> None:
        _check_exists(self.path)
        first = next(self._lines(), b"")
        if not first:
            raise ValueError(f"{self.path}: empty file; at least one row is required")
        cells = first.rstrip(b"\r\n").split(self.delimiter.encode())
        if self.header:
            names = [cell.decode(errors="replace") for cell in cells]
            if missing := [name for name in self.required if name not in names]:
                raise ValueError(f"{self.path}: line 1: columns {missing} are required, the header has {names}")
        elif len(cells) != len(self.columns):
            raise ValueError(self._wrong_width(1, len(cells), len(self.columns)))

    def batches(self) -> Iterator[pa.Table]:
        """Its rows in order."""
        waiting, num_bytes = list[pa.RecordBatch](), 0
        for block in self._blocks():
            waiting.append(block)
            num_bytes += block.nbytes
            if num_bytes >= BATCH_BYTES:
                yield pa.Table.from_batches(waiting)
                waiting, num_bytes = [], 0
        if waiting:
            yield pa.Table.from_batches(waiting)

    def _blocks(self) -> Iterator[pa.RecordBatch]:
        types = {name: pa.string() if kind == "category" else pa.int64() for name, kind in self.required.items()}
        try:
            with pa.input_stream(self.path, compression="gzip" if self._is_gzip else None) as stream:
                yield from pyarrow.csv.open_csv(
                    stream,
                    read_options=pyarrow.csv.ReadOptions(
                        column_names=None if self.header else list(self.columns), block_size=BLOCK_BYTES
                    ),
                    parse_options=pyarrow.csv.ParseOptions(
                        delimiter=self.delimiter, quote_char=False, ignore_empty_lines=False
                    ),
                    convert_options=pyarrow.csv.ConvertOptions(
                        column_types=types,
                        include_columns=list(self.required),
                        strings_can_be_null=True,
                        null_values=[""],
                    ),
                )
        except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            self._explain(error)

    def place(self, row: int) -> str:
        return f"{self.path}: line {row + 1 + self.header}"

    @property
    def _is_gzip(self) -> bool:
        return self.path.suffix == ".gz"

    def _lines(self) -> Iterator[bytes]:
        """The file's lines, with whatever is wrong with its compression as a ValueError."""
        number = 0
        try:
            with gzip.open(self.path) if self._is_gzip else self.path.open("rb") as stream:
                for line in stream:
                    number += 1
                    yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{self.path}: gzip stream is truncated or damaged after line {number} ({error}); get the file again"
            ) from error

    def _explain(self, error: Exception) -> None:
        """Find the line the parallel parser stopped at, which it does not tell."""
        integers = {name for name, kind in self.required.items() if kind != "category"}
        names: Sequence[str] = self.columns
        for number, line in enumerate(self._lines(), 1):
            cells = line.rstrip(b"\r\n").split(self.delimiter.encode())
            if self.header and number == 1:
                names = [cell.decode(errors="replace") for cell in cells]
                continue
            if len(cells) != len(names):
                raise ValueError(self._wrong_width(number, len(cells), len(names))) from error
            for name, cell in zip(names, cells, strict=True):
                if name in self.required and (fault := _cell_fault(cell, integer=name in integers)):
                    raise ValueError(f"{self.path}: line {number}, column {name!r}: {fault}") from error
        raise ValueError(f"{self.path}: not readable: {error}") from error

    def _wrong_width(self, line: int, found: int, wanted: int) -> str:
        return (
            f"{self.path}: line {line}: {wanted} columns separated by {self.delimiter!r} are required, got {found}; "
            "the line is broken or the file is of another kind"
        )


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

    def batches(self) -> Iterator[pa.Table]:
        """Its rows in order."""
        file = open_parquet(self.path)
        stored = [self.renamed.get(name, name) for name in self.required]
        for group in range(file.num_row_groups):
            try:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=stored):
                    columns = {name: batch.column(old) for name, old in zip(self.required, stored, strict=True)}
                    yield pa.table(columns)
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
    _check_exists(path)
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        size = path.stat().st_size
        raise ValueError(f"{path}: not a readable Parquet file, truncated? ({size} bytes; {error})") from error


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet, by its first bytes (by its name when it is too short to tell)."""
    _check_exists(path)
    with path.open("rb") as stream:
        return stream.read(4) == PARQUET_MAGIC or path.suffix in (".parquet", ".pq")


def is_acceptable(found: pa.DataType, kind: Requirement) -> bool:
    """Whether a column of type ``found`` can serve as ``kind``."""
    types = pa.types
    if kind in ("list", "id list"):
        is_list = types.is_list(found) or types.is_large_list(found)
        return is_list and is_acceptable(found.value_type, "category" if kind == "list" else "ids")
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


def _check_exists(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; name the raw files themselves")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")


def _cell_fault(cell: bytes, *, integer: bool) -> str | None:
    if integer:
        try:
            if cell and not -(2**63) <= int(cell.decode("ascii", "replace")) < 2**63:
                return f"{cell.decode()} does not fit into 64 bits"
        except ValueError:
            return f"an integer or nothing is required, got {cell.decode(errors='replace')!r}"
        return None
    try:
        cell.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error}), got {cell!r}"
    return None
