"""Writes the rows of the click model as a raw log: Parquet with the true probability, or Criteo's 40-column TSV."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from data_pipelines.synthetic_model import Bool, ClickModel, Rows, UInt32
from data_pipelines.synthetic_shape import CATEGORICAL, NUMERIC, SMALLEST_TOTAL_IDS
from recemb.data.manifest import TRUE_PROBABILITY

CHUNK_ROWS = 65_536
LARGEST_DAYS = 127

TSV_SCHEMA = pa.schema(
    [
        ("label", pa.int8()),
        *((shape.name, pa.int32()) for shape in NUMERIC),
        *((shape.name, pa.string()) for shape in CATEGORICAL),
    ]
)
PARQUET_SCHEMA = pa.schema([*TSV_SCHEMA, ("day", pa.int8()), (TRUE_PROBABILITY, pa.float32())])


def _hex_digits() -> npt.NDArray[np.uint32]:
    """(65536,) the four ASCII digits of every 16-bit number, packed as they lie in memory."""
    return np.frombuffer("".join(f"{number:04x}" for number in range(1 << 16)).encode(), dtype=np.uint32)


def _validity(null: Bool | None) -> pa.Buffer | None:
    return None if null is None else pa.py_buffer(np.packbits(~null, bitorder="little"))


def _strings(values: UInt32, null: Bool | None, digits: npt.NDArray[np.uint32]) -> pa.Array:
    """(B,) strings of eight hexadecimal digits, built as Arrow buffers: a Python string a cell would be 50x slower."""
    text = np.empty((len(values), 2), dtype=np.uint32)
    text[:, 0] = digits[values >> np.uint32(16)]
    text[:, 1] = digits[values & np.uint32(0xFFFF)]
    offsets = np.arange(0, 8 * len(values) + 1, 8, dtype=np.int32)
    return pa.Array.from_buffers(
        pa.string(), len(values), [_validity(null), pa.py_buffer(offsets), pa.py_buffer(text.reshape(-1))]
    )


def _batch(rows: Rows, schema: pa.Schema, digits: npt.NDArray[np.uint32]) -> pa.RecordBatch:
    columns: dict[str, pa.Array] = {"label": pa.array(rows.label)}
    for shape in NUMERIC:
        values = pa.py_buffer(rows.numeric[shape.name].astype(np.int32))
        null = _validity(rows.null.get(shape.name))
        columns[shape.name] = pa.Array.from_buffers(pa.int32(), len(rows.label), [null, values])
    for category in CATEGORICAL:
        name = category.name
        columns[name] = _strings(rows.categorical[name], rows.null.get(name), digits)
    columns["day"] = pa.array(rows.day)
    columns[TRUE_PROBABILITY] = pa.array(rows.probability.astype(np.float32))
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _writer(path: Path, format: str) -> Callable[[], pq.ParquetWriter | pacsv.CSVWriter]:
    if format == "tsv":
        options = pacsv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
        return lambda: pacsv.CSVWriter(path, TSV_SCHEMA, write_options=options)
    # Nobody prunes row groups of this log by statistics, and they cost a third of the writing.
    return lambda: pq.ParquetWriter(
        path, PARQUET_SCHEMA, compression="zstd", compression_level=1, write_statistics=False
    )


def batches(
    model: ClickModel, *, rows: int, days: int, schema: pa.Schema = PARQUET_SCHEMA, chunk_rows: int = CHUNK_ROWS
) -> Iterator[pa.RecordBatch]:
    """The log in order of time, ``chunk_rows`` rows at a time; the size of the chunks changes no value.

    Raises:
        ValueError: rows or chunk_rows below 1, days outside [1, 127].
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if not 1 <= days <= LARGEST_DAYS:
        raise ValueError(f"days must be in [1, {LARGEST_DAYS}], got {days}")
    digits = _hex_digits()
    for start in range(0, rows, chunk_rows):
        chunk = model.rows(start, min(start + chunk_rows, rows), total_rows=rows, days=days)
        yield _batch(chunk, schema, digits)


def default_total_ids(rows: int) -> int:
    """Ids of a log of ``rows`` rows where nobody says: one a row, within [2,000, Criteo's 33,762,577]."""
    criteo = sum(shape.cardinality for shape in CATEGORICAL)
    return min(max(rows, SMALLEST_TOTAL_IDS), criteo)


def generate(
    path: str | Path,
    *,
    rows: int,
    seed: int = 0,
    total_ids: int | None = None,
    days: int = 7,
    format: str = "parquet",
) -> Path:
    """Write a raw log of ``rows`` rows in order of time and return its path.

    Memory is bounded by one chunk of 65,536 rows (under 200 MB above the interpreter), whatever the rows and ids. The
    file appears under its name only when complete; an existing one is replaced.

    Args:
        path: the file to write; its directory is made.
        rows: rows of the log.
        seed: of every value; logs of the same seed, rows, total_ids and days are the same byte for byte.
        total_ids: ids alive at any one moment over the 26 columns, in [2,000, 2,000,000,000]; None: as many as rows,
            which is about as sparse as Criteo, but at most Criteo's 33,762,577. 10x fewer makes tables that are easy to
            learn. The model of clicks depends on the seed and on this, not on the rows.
        days: days the rows are spread over evenly, in [1, 127].
        format: ``"parquet"`` (label, I1-I13, C1-C26, day, true_probability) or ``"tsv"``: Criteo's 40 columns, which
            have no place for the last two.

    Raises:
        ValueError: an argument out of its range, another format.
    """
    if format not in ("parquet", "tsv"):
        raise ValueError(f"format must be 'parquet' or 'tsv', got {format!r}")
    path = Path(path)
    model = ClickModel(seed=seed, total_ids=default_total_ids(rows) if total_ids is None else total_ids)
    schema = TSV_SCHEMA if format == "tsv" else PARQUET_SCHEMA
    stream = batches(model, rows=rows, days=days, schema=schema)
    first = next(stream)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with _writer(partial, format)() as writer:
            writer.write_batch(first)
            for batch in stream:
                writer.write_batch(batch)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
