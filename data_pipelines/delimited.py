"""Text logs: one row a line, cells separated by a tab or a comma, plain or gzip."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.csv

from data_pipelines.schema import Requirement
from data_pipelines.sources import LazyBatch, RowError, check_exists

# Bytes of text of one batch, the unit of parallel work: enough that most of its values repeat.
BATCH_BYTES = 16 << 20
# Bytes parsed at once: a block that stays in the cache halves the processor time of parsing 16 MB at once.
PARSED_BYTES = 1 << 20
_ROOM_FOR_LINE = 1 << 16


@dataclass(frozen=True)
class DelimitedFile:
    """A text file with one row a line, plain or gzip (name ends in .gz). An empty cell is a missing value.

    Args:
        path: the file.
        columns: all names in file order; ignored when there is a header.
        required: columns to read and what they hold.
        delimiter: one character.
        header: whether the first line holds names.
        quoted: whether a cell with a separator stands in double quotes. No cell may hold a line break.
    """

    path: Path
    columns: tuple[str, ...]
    required: Mapping[str, Requirement]
    delimiter: str = "\t"
    header: bool = False
    quoted: bool = False

    def check(self) -> None:
        check_exists(self.path)
        first = next(self._lines(), b"")
        if not first:
            raise ValueError(f"{self.path}: empty file; at least one row is required")
        cells = self._cells(first)
        if self.header:
            names = [cell.decode(errors="replace") for cell in cells]
            if missing := [name for name in self.required if names.count(name) != 1]:
                raise ValueError(f"{self.path}: line 1: columns {missing} are required once, the header has {names}")
        elif len(cells) != len(self.columns):
            raise ValueError(f"{self.path}: line 1: {self._wrong_width(len(cells), len(self.columns))}")

    def names(self) -> list[str]:
        """The names of its columns, as the header has them where there is one."""
        if not self.header:
            return list(self.columns)
        with self._open() as stream:
            return self._read_header(stream)

    def batches(self) -> Iterator[LazyBatch]:
        """Its rows in order: whole lines, parsed when called."""
        with self._open() as stream:
            names = self._read_header(stream) if self.header else list(self.columns)
            while block := self._read(stream):
                yield partial(self._parse, block, names)

    def _read(self, stream: BufferedIOBase) -> memoryview:
        try:
            # Read in place, with room for the rest of the last line: adding it to a bytes object would copy them all.
            block = memoryview(bytearray(BATCH_BYTES + _ROOM_FOR_LINE))
            length = stream.readinto(block[:BATCH_BYTES])
            rest = stream.readline()
            if len(rest) > _ROOM_FOR_LINE:
                return memoryview(bytes(block[:length]) + rest)
            block[length : length + len(rest)] = rest
            return block[: length + len(rest)]
        except (EOFError, zlib.error, gzip.BadGzipFile):
            # Lines are counted only when one is to be named.
            for _ in self._lines():
                pass
            raise

    def _parse(self, block: memoryview, names: list[str]) -> pa.Table:
        types = {name: pa.string() if kind == "category" else pa.int64() for name, kind in self.required.items()}
        try:
            # One thread: workers parse a block each.
            return pyarrow.csv.read_csv(
                pa.BufferReader(block),
                read_options=pyarrow.csv.ReadOptions(column_names=names, block_size=PARSED_BYTES, use_threads=False),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=self.delimiter, quote_char='"' if self.quoted else False, ignore_empty_lines=False
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=types,
                    include_columns=list(self.required),
                    strings_can_be_null=True,
                    null_values=[""],
                ),
            )
        except pa.ArrowInvalid as error:
            raise self._fault(block, names, str(error)) from error

    def place(self, row: int) -> str:
        return f"{self.path}: line {row + 1 + self.header}"

    def _open(self) -> BufferedIOBase:
        if self.path.suffix == ".gz":
            return cast(BufferedIOBase, gzip.open(self.path))
        return self.path.open("rb")

    def _lines(self) -> Iterator[bytes]:
        """The file's lines, with whatever is wrong with its compression as a ValueError."""
        number = 0
        try:
            with self._open() as stream:
                for line in stream:
                    number += 1
                    yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{self.path}: gzip stream is truncated or damaged after line {number} ({error}); get the file again"
            ) from error

    def _cells(self, line: bytes) -> list[bytes]:
        if self.quoted:
            text = line.decode("latin-1").rstrip("\r\n")
            return [cell.encode("latin-1") for cell in next(csv.reader([text], delimiter=self.delimiter), [""])]
        return line.rstrip(b"\r\n").split(self.delimiter.encode())

    def _read_header(self, stream: BufferedIOBase) -> list[str]:
        return [cell.decode(errors="replace") for cell in self._cells(stream.readline())]

    def _fault(self, block: memoryview, names: Sequence[str], reason: str) -> ValueError:
        """The first line of a block that Arrow's parser must have stopped at; it does not tell which."""
        for row, line in enumerate(bytes(block).splitlines(keepends=True)):
            cells = self._cells(line)
            if len(cells) != len(names):
                return RowError(row, self._wrong_width(len(cells), len(names)))
            for name, cell in zip(names, cells, strict=True):
                kind = self.required.get(name)
                if kind is not None and (fault := _cell_fault(cell, integer=kind != "category")):
                    return RowError(row, f"column {name!r}: {fault}")
        return ValueError(f"{self.path}: not readable: {reason}")

    def _wrong_width(self, found: int, wanted: int) -> str:
        return (
            f"{wanted} columns separated by {self.delimiter!r} are required, got {found}; "
            "the line is broken or the file is of another kind"
        )


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
