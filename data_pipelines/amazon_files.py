"""Amazon product reviews and their items' metadata, in the formats they were published in.

Reviews:

- JSON, a review a line, plain or .gz: ``reviewerID``, ``asin``, ``unixReviewTime`` (2014 and 2018, reviews and 5-core)
  or ``user_id``, ``parent_asin``, ``timestamp`` (2023). Lines of Python's own notation (2014) are read too, slowly.
- CSV: without a header ``user,item,rating,timestamp`` (2014's ratings; 2018 has item first: name the columns), or with
  one that names user_id, item_id, timestamp and perhaps category (or as in the JSON).
- Parquet: user_id, item_id, timestamp or pos (the place in the user's list), perhaps category.

Metadata: JSON or Python's notation, ``asin`` (or ``parent_asin``) with ``categories`` or ``category``: the category of
an item is the last, finest entry of its last list. Or Parquet: item_id with ``category``, or ``attributes`` (texts
separated by spaces, the last the finest).
"""

from __future__ import annotations

import ast
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from data_pipelines.delimited import DelimitedFile
from data_pipelines.event_store import no_nulls
from data_pipelines.schema import Requirement
from data_pipelines.sources import (
    LazyBatch,
    ParquetFile,
    Renamed,
    RowError,
    Source,
    check_exists,
    is_parquet,
    open_parquet,
)

EVENT_COLUMNS = ("user", "item", "moment")
_ALIASES = {
    "user": ("user_id", "reviewerID", "user"),
    "item": ("item_id", "asin", "parent_asin", "item"),
    "moment": ("timestamp", "unixReviewTime", "pos", "time"),
    "category": ("category",),
}
_RANK = "pos"
_HEADERLESS = ("user", "item", "rating", "timestamp")
_BATCH_BYTES = 16 << 20
_KINDS: dict[str, Requirement] = {"user": "category", "item": "category", "moment": "time", "category": "category"}


@dataclass(frozen=True)
class Reviews:
    """A file of reviews.

    Args:
        source: its columns under the names of EVENT_COLUMNS, and ``category`` where it has one.
        has_times: whether ``moment`` is a time; else a rank within the user.
        has_category: whether ``category`` is there.
    """

    source: Source
    has_times: bool
    has_category: bool

    def table(self, raw: pa.Table) -> pa.Table:
        """Raw rows -> user and item as texts, or as integers where the file has them; moment int64.

        Raises:
            RowError: a value missing.
        """
        no_nulls(raw, list(EVENT_COLUMNS))
        columns = {name: _plain(raw[name]) for name in ("user", "item")}
        columns["moment"] = raw["moment"].cast(pa.int64())
        if self.has_category:
            columns["category"] = _plain(raw["category"])
        return pa.table(columns)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.int64() if pa.types.is_integer(column.type) else pa.string())


def open_reviews(path: Path, columns: tuple[str, ...] | None) -> Reviews:
    """Recognise a file of reviews.

    Args:
        path: the file.
        columns: names of the columns of a CSV without a header.

    Raises:
        FileNotFoundError, ValueError: no such file, or the columns are not there.
    """
    check_exists(path)
    if is_parquet(path):
        stored = _stored(path, open_parquet(path).schema_arrow.names)
        source: Source = ParquetFile(path, {name: _KINDS[name] for name in stored}, stored)
    elif _is_csv(path):
        header = columns is None and _has_header(path)
        names = _first_cells(path) if header else list(columns or _HEADERLESS)
        stored = _stored(path, names)
        required = {old: _KINDS[new] for new, old in stored.items()}
        source = Renamed(DelimitedFile(path, tuple(names), required, ",", header=header, quoted=True), stored)
    else:
        stored = _stored(path, list(_first_record(path)))
        stored.pop("category", None)
        source = JSONLines(path, stored)
    return Reviews(source, stored["moment"] != _RANK, "category" in stored)


def _stored(path: Path, names: list[str]) -> dict[str, str]:
    """Name that comes out -> name in the file."""
    stored = {}
    for name, aliases in _ALIASES.items():
        found = [alias for alias in aliases if alias in names]
        if found:
            stored[name] = found[0]
        elif name != "category":
            raise ValueError(f"{path}: a column of {list(aliases)} is required, the file has {names}")
    if "parent_asin" in names:
        # Of 2023: variants of one product have metadata under their parent only.
        stored["item"] = "parent_asin"
    return stored


def _is_csv(path: Path) -> bool:
    return ".csv" in path.suffixes


def _first_cells(path: Path) -> list[str]:
    for _, line in text_lines(path):
        return next(csv.reader([line]))
    raise ValueError(f"{path}: empty file; at least one row is required")


def _has_header(path: Path) -> bool:
    cells = _first_cells(path)
    known = {alias for aliases in _ALIASES.values() for alias in aliases}
    if len(known & set(cells)) >= 2:
        return True
    if len(cells) != len(_HEADERLESS):
        raise ValueError(
            f"{path}: line 1: a header, or the columns {list(_HEADERLESS)} without one, are required, got {cells}"
        )
    return False


def _first_record(path: Path) -> Mapping[str, Any]:
    for number, line in text_lines(path):
        return record(path, number, line)
    raise ValueError(f"{path}: empty file; at least one row is required")


@dataclass(frozen=True)
class JSONLines:
    """A JSON object a line.

    Args:
        path: the file.
        stored: name that comes out -> key.
    """

    path: Path
    stored: Mapping[str, str]

    def check(self) -> None:
        check_exists(self.path)

    def place(self, row: int) -> str:
        return f"{self.path}: line {row + 1}"

    def batches(self) -> Iterator[LazyBatch]:
        """Whole lines, 16 MB at a time."""
        with _open(self.path) as stream:
            while lines := stream.readlines(_BATCH_BYTES):
                yield partial(self._parse, lines)

    def _parse(self, lines: list[bytes]) -> pa.Table:
        types = {key: pa.int64() if name == "moment" else pa.string() for name, key in self.stored.items()}
        options = pyarrow.json.ParseOptions(pa.schema(types), unexpected_field_behavior="ignore")
        try:
            table = pyarrow.json.read_json(
                pa.BufferReader(b"".join(lines)),
                read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=_BATCH_BYTES),
                parse_options=options,
            )
            if len(table) == len(lines):
                return pa.table({name: table[key] for name, key in self.stored.items()})
        except pa.ArrowInvalid:
            pass
        # Python's notation, or a broken line, which only this finds.
        return self._parse_slowly(lines)

    def _parse_slowly(self, lines: list[bytes]) -> pa.Table:
        values: dict[str, list[Any]] = {name: [] for name in self.stored}
        for row, line in enumerate(lines):
            try:
                fields = parse_record(line.decode())
            except ValueError as error:
                raise RowError(row, str(error)) from error
            for name, key in self.stored.items():
                wanted = int if name == "moment" else str
                if not isinstance(fields.get(key), wanted | None) or isinstance(fields.get(key), bool):
                    raise RowError(row, f"column {key!r}: {wanted.__name__} is required, got {fields.get(key)!r}")
                values[name].append(fields.get(key))
        types = {name: pa.int64() if name == "moment" else pa.string() for name in values}
        return pa.table({name: pa.array(column, types[name]) for name, column in values.items()})


def parse_record(line: str) -> dict[str, Any]:
    """A JSON object, or a dict in Python's notation as in the metadata of 2014.

    Raises:
        ValueError: neither.
    """
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        try:
            fields = ast.literal_eval(line)
        except (ValueError, SyntaxError):
            raise ValueError(f"a JSON object is required ({error}), got {line[:60].rstrip()!r}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON object is required, got {line[:60].rstrip()!r}")
    return cast(dict[str, Any], fields)


def record(path: Path, number: int, line: str) -> dict[str, Any]:
    """Line ``number`` of a file as a dict; ValueError with the place."""
    try:
        return parse_record(line)
    except ValueError as error:
        raise ValueError(f"{path}: line {number}: {error}") from error


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines from 1; ValueError where gzip or UTF-8 is broken."""
    check_exists(path)
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.decode()
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: truncated or damaged after line {number} ({error}); get the file again") from error


def read_categories(path: Path, is_known: Callable[[Any], bool]) -> dict[Any, str | None]:
    """The category of every item of a metadata file for which ``is_known`` holds; None where it lists none.

    Raises:
        FileNotFoundError, ValueError: with the line or row, what is required and what came.
    """
    if is_parquet(path):
        return {item: category for item, category in _parquet_categories(path).items() if is_known(item)}
    categories: dict[Any, str | None] = {}
    for number, line in text_lines(path):
        fields = record(path, number, line)
        item = fields.get("parent_asin") or fields.get("asin")
        if not isinstance(item, str):
            raise ValueError(f"{path}: line {number}: 'asin' or 'parent_asin' is required, got {sorted(fields)}")
        if is_known(item):
            categories[item] = _finest(path, number, fields.get("categories", fields.get("category")))
    return categories


def _finest(path: Path, number: int, listed: Any) -> str | None:
    """``[["Books", "Crime"], ["Gifts"]]`` -> ``"Gifts"``: the last of the last, as DIN's own preparation takes it."""
    while isinstance(listed, list) and listed:
        listed = listed[-1]
    if listed is None or listed == []:
        return None
    if not isinstance(listed, str):
        raise ValueError(f"{path}: line {number}: 'categories' must be lists of texts, got {listed!r}")
    return listed


def _parquet_categories(path: Path) -> dict[Any, str | None]:
    table = open_parquet(path).read()
    column = next((name for name in ("category", "attributes") if name in table.column_names), None)
    if column is None or "item_id" not in table.column_names:
        raise ValueError(f"{path}: item_id and category or attributes are required, the file has {table.column_names}")
    texts = table[column].cast(pa.string())
    if column == "attributes":
        texts = pc.replace_substring_regex(texts, r"^.* ", "")
    return dict(zip(table["item_id"].to_pylist(), texts.to_pylist(), strict=True))
