"""Second pass: encoded chunks -> counts of train rows, then the Parquet files of the splits with final ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.encode import Chunk
from data_pipelines.schema import CategoricalColumn, LogSchema
from data_pipelines.splitting import SPLITS, Assignment
from data_pipelines.vocabulary import OUT_OF_VOCABULARY, TrainCounter, Vocabulary
from recemb.data.manifest import DataFile, Split, describe_file

ROW_GROUP_ROWS = 65_536
# Parts are written in parallel, so they bound both the use of cores and, at four bytes a cell, nothing in memory:
# a part is streamed row group by row group.
PART_ROWS = 16 * ROW_GROUP_ROWS


@dataclass(frozen=True)
class Layout:
    """Which chunks hold which rows.

    Args:
        chunks: all chunks in order.
        rows: (chunks, 3) rows of each chunk in train, validation and test.
    """

    chunks: Sequence[Chunk]
    rows: npt.NDArray[np.int64]

    def splits_of(self, chunk: Chunk) -> npt.NDArray[np.int8]:
        """(N,) split number of each row of ``chunk``, as lay_out found them."""
        return np.load(_split_file(chunk))

    def parts(self) -> Iterator[tuple[int, int, list[Chunk]]]:
        """(split, part number, its chunks): about PART_ROWS rows each."""
        for split in range(len(SPLITS)):
            number, rows, chunks = 0, 0, list[Chunk]()
            for chunk, count in zip(self.chunks, self.rows[:, split], strict=True):
                if count:
                    chunks.append(chunk)
                    rows += int(count)
                if rows >= PART_ROWS:
                    yield split, number, chunks
                    number, rows, chunks = number + 1, 0, []
            if chunks:
                yield split, number, chunks


def lay_out(chunks: Sequence[Chunk], assignment: Assignment, *, needs_keys: bool) -> Layout:
    """Assign every row to its split; a row's number lies beside its chunk, a byte each.

    Raises:
        ValueError: a split gets no row.
    """
    rows = np.zeros((len(chunks), len(SPLITS)), np.int64)
    for chunk, counts in zip(chunks, rows, strict=True):
        numbers = assignment.of(chunk.keys(needs_keys=needs_keys))
        np.save(_split_file(chunk), numbers)
        counts += np.bincount(numbers, minlength=len(SPLITS))
    totals = dict(zip(SPLITS, rows.sum(axis=0).tolist(), strict=True))
    if empty := [name for name, count in totals.items() if not count]:
        raise ValueError(
            f"split {assignment.rule.kind}: every split needs at least one row, {empty} would be empty "
            f"(rows: {totals}); choose other fractions or another kind of split"
        )
    return Layout(chunks, rows)


def _split_file(chunk: Chunk) -> Path:
    return chunk.path.with_suffix(".npy")


def count_train(
    layout: Layout, features: Sequence[CategoricalColumn], num_values: Mapping[str, int], pool: ThreadPoolExecutor
) -> dict[str, npt.NDArray[np.int64]]:
    """Occurrences in train of every provisional id, by table.

    Args:
        layout: the split.
        features: all features; those without a vocabulary are left out.
        num_values: number of provisional ids by table.
        pool: tables are counted in parallel.
    """

    def count(table: str) -> npt.NDArray[np.int64]:
        names = [feature.name for feature in features if feature.table == table]
        counter = TrainCounter(num_values[table])
        for chunk, rows in zip(layout.chunks, layout.rows, strict=True):
            if not rows[0]:
                continue
            batch = chunk.read(names)
            if rows[0] < chunk.num_rows:
                batch = batch.filter(pa.array(layout.splits_of(chunk) == 0))
            for column in batch.columns:
                counter.add((column.flatten() if pa.types.is_list(column.type) else column).to_numpy())
        return counter.counts

    return dict(zip(num_values, pool.map(count, num_values), strict=True))


class PartWriter:
    """Writes the Parquet files of a data set.

    Args:
        root: directory of the data set.
        schema: the log.
        layout: its split.
        vocabularies: by table.
    """

    def __init__(self, root: Path, schema: LogSchema, layout: Layout, vocabularies: Mapping[str, Vocabulary]) -> None:
        self.root = root
        self.schema = schema
        self.layout = layout
        self.vocabularies = vocabularies
        self._remaps = {
            feature.name: vocabularies[feature.table].remap
            for feature in schema.features
            if feature.encoding == "vocabulary"
        }

    def write(self, pool: ThreadPoolExecutor) -> tuple[dict[str, Split], dict[str, Counter[str]]]:
        """Write all parts in parallel; return the splits, and entries with id 0 by split and feature."""
        for split in SPLITS:
            (self.root / split).mkdir()
        parts = list(self.layout.parts())
        written = list(pool.map(self._write_part, parts))
        files: dict[str, list[DataFile]] = {split: [] for split in SPLITS}
        unknown = {split: Counter[str]() for split in SPLITS}
        for (number, _, _), (file, counts) in zip(parts, written, strict=True):
            files[SPLITS[number]].append(file)
            unknown[SPLITS[number]].update(counts)
        return {name: Split(tuple(entries)) for name, entries in files.items()}, unknown

    def _write_part(self, part: tuple[int, int, list[Chunk]]) -> tuple[DataFile, Counter[str]]:
        split, number, chunks = part
        path = self.root / SPLITS[split] / f"part-{number:05}.parquet"
        unknown: Counter[str] = Counter()
        writer: pq.ParquetWriter | None = None
        waiting: list[pa.RecordBatch] = []
        rows = 0
        try:
            for chunk in chunks:
                waiting.append(self._final(chunk, split, unknown))
                rows += waiting[-1].num_rows
                writer = writer or open_writer(path, waiting[0].schema)
                if rows >= ROW_GROUP_ROWS or chunk is chunks[-1]:
                    table = pa.Table.from_batches(waiting)
                    whole = rows if chunk is chunks[-1] else rows - rows % ROW_GROUP_ROWS
                    writer.write_table(table.slice(0, whole), row_group_size=ROW_GROUP_ROWS)
                    waiting, rows = table.slice(whole).to_batches(), rows - whole
        finally:
            if writer is not None:
                writer.close()
        return describe_file(self.root, path), unknown

    def _final(self, chunk: Chunk, split: int, unknown: Counter[str]) -> pa.RecordBatch:
        """The rows of ``chunk`` in ``split`` with final ids; counts id 0 into ``unknown``."""
        batch = chunk.read(self.schema.output_names)
        numbers = self.layout.splits_of(chunk)
        if (numbers != split).any():
            batch = batch.filter(pa.array(numbers == split))
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        for name, remap in self._remaps.items():
            column = columns[name]
            is_list = pa.types.is_list(column.type)
            ids = np.take(remap, (column.flatten() if is_list else column).to_numpy(), mode="clip")
            unknown[name] += len(ids) - int(np.count_nonzero(ids != OUT_OF_VOCABULARY))
            columns[name] = pa.array(ids)
            if is_list:
                offsets = np.append(0, np.cumsum(column.value_lengths().to_numpy())).astype(np.int32)
                columns[name] = pa.ListArray.from_arrays(pa.array(offsets), columns[name])
        return pa.RecordBatch.from_pydict(columns)


def open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer with the settings of encoded data sets.

    Dictionary encoding under zstd: of plain, byte-stream-split and dictionary pages, the smallest (46 bytes a row of a
    Criteo-shaped log, plain 54) and, of those with zstd, the quickest to read (4.1 million rows a second and core,
    plain 3.2). Without compression reading doubles and files grow by a third.
    """
    return pq.ParquetWriter(path, schema, compression="zstd", compression_level=1, use_dictionary=True)
