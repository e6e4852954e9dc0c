"""First pass: batches of a raw log -> checked, typed chunks with provisional ids, kept on disk for the second pass.

A chunk lies in its own uncompressed Arrow file, so the second pass (count, then write) neither parses nor hashes
anything again. The chunks take about 4 bytes of disk for each cell (8 for hashed ids) until the preparation ends.

Shapes: N rows of a chunk, L entries of all its lists.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines import transforms
from data_pipelines.hashing import hash_values
from data_pipelines.schema import CategoricalColumn, LogSchema, NumericColumn
from data_pipelines.sequences import check_sequences
from data_pipelines.sources import LazyBatch, RowError, Source, contiguous
from data_pipelines.splitting import RowKeys, SplitKind
from data_pipelines.transforms import moments_of
from data_pipelines.vocabulary import ValueIndex
from recemb.data.manifest import TRUE_PROBABILITY

# Columns of a chunk that do not come out.
MOMENT = "__moment"
DAY = "__day"

# Days order rows before their number does; a log of 2**40 rows fits.
_ROW_BITS = 40


@dataclass(frozen=True)
class Chunk:
    """An encoded chunk on disk.

    Args:
        path: Arrow file.
        file_number: raw file it comes from.
        num_rows: N.
        first_row: number of its first row in the whole log; known once all chunks before it are encoded.
        missing: null cells by numeric column.
    """

    path: Path
    file_number: int
    num_rows: int
    missing: Counter[str] = field(default_factory=Counter)
    first_row: int = 0

    def read(self, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Its rows, memory-mapped."""
        with pa.memory_map(str(self.path)) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
        return batch if columns is None else batch.select(list(columns))

    def keys(self, *, needs_keys: bool) -> RowKeys:
        """What a split asks of its rows."""
        if not needs_keys:
            return RowKeys(self.first_row, self.num_rows, days=self.file_number)
        batch = self.read()
        if MOMENT in batch.schema.names:
            # Users and given splits have no days, and do not ask.
            days = batch.column(DAY).to_numpy() if DAY in batch.schema.names else None
            return RowKeys(self.first_row, self.num_rows, batch.column(MOMENT).to_numpy(), days)
        days = batch.column(DAY).to_numpy()
        rows = np.arange(self.first_row, self.first_row + self.num_rows)
        return RowKeys(self.first_row, self.num_rows, (days << _ROW_BITS) + rows, days)


class ChunkEncoder:
    """Checks and encodes chunks of one log; safe to call from several threads.

    Args:
        schema: the log.
        split: the kind of split, where it asks for something of every row (see ``needs_keys``); else None.
    """

    def __init__(self, schema: LogSchema, *, split: SplitKind | None) -> None:
        self.schema = schema
        self.split = split
        tables = {feature.table for feature in schema.features if feature.encoding == "vocabulary"}
        self.indices = {table: ValueIndex() for table in sorted(tables)}

    def encode(self, load: LazyBatch, path: Path, file_number: int) -> Chunk:
        """Parse and encode one batch of file ``file_number`` into the Arrow file ``path``.

        Raises:
            RowError: a value breaks its column's rule.
            ValueError: the batch cannot be parsed at all.
        """
        raw = contiguous(load())
        columns: dict[str, pa.Array] = {self.schema.label: self._label(raw)}
        missing: Counter[str] = Counter()
        for column in self.schema.numeric:
            columns |= self._numeric(raw, column)
            missing[column.name] = raw.column(column.name).null_count
        for feature in self.schema.categorical:
            columns[feature.name] = self._categorical(raw, feature)
        check_sequences(raw, self.schema)
        for name in self.schema.carried:
            columns[name] = self._carried(raw, name)
        if self.split is not None:
            columns |= self._keys(raw)
        batch = pa.RecordBatch.from_pydict(columns)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        return Chunk(path, file_number, len(batch), missing)

    def _label(self, raw: pa.RecordBatch) -> pa.Array:
        column = raw.column(self.schema.label)
        values = transforms.to_float64(column)
        wrong = ~((values == 0) | (values == 1))
        if wrong.any():
            row = int(wrong.argmax())
            raise RowError(row, f"column {self.schema.label!r}: labels must be 0 or 1, got {column[row].as_py()!r}")
        return pa.array(values.astype(np.int8))

    def _numeric(self, raw: pa.RecordBatch, column: NumericColumn) -> dict[str, pa.Array]:
        numbers = raw.column(column.name)
        values = transforms.to_float64(numbers)
        if pa.types.is_floating(numbers.type) and (row := transforms.first_not_finite(values, numbers)) is not None:
            raise RowError(
                row,
                f"column {column.name!r}: numbers must be finite (missing ones null), got {numbers[row].as_py()!r}",
            )
        encoded: dict[str, pa.Array] = {}
        if column.transform == "none":
            encoded[column.name] = pa.array(np.nan_to_num(values, nan=0.0).astype(np.float32))
        elif column.keeps_number:
            encoded[column.name] = pa.array(transforms.log1p(values))
        if (name := column.bucket_name) is not None:
            # Counts repeat: the rule is applied to the batch's distinct numbers.
            distinct = numbers.dictionary_encode()
            categories = transforms.bucket(transforms.to_float64(distinct.dictionary))
            column_of_categories = pa.DictionaryArray.from_arrays(distinct.indices, categories)
            encoded[name] = pa.array(self.indices[name].provisional_ids(column_of_categories))
        return encoded

    def _categorical(self, raw: pa.RecordBatch, feature: CategoricalColumn) -> pa.Array:
        column = raw.column(feature.name)
        if feature.kind == "single":
            return pa.array(self._ids(feature, column, None))
        offsets, entries = transforms.keep_latest(column, feature.max_length)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(self._ids(feature, entries, offsets)))

    def _ids(
        self, feature: CategoricalColumn, values: pa.Array, offsets: npt.NDArray[np.int32] | None
    ) -> npt.NDArray[np.int32] | npt.NDArray[np.int64]:
        """(N,) or (L,) raw values -> ids as int32 (provisional) or int64 (hashed, given)."""
        if feature.encoding == "vocabulary":
            try:
                return self.indices[feature.table].provisional_ids(values)
            except ValueError as error:
                raise RowError(0, f"column {feature.name!r}: {error}") from error
        if feature.encoding == "hash":
            encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
            # A missing value's index is -1, which picks the last entry.
            hashes = hash_values(pa.concat_arrays([encoded.dictionary, pa.nulls(1, encoded.dictionary.type)]))
            if feature.num_embeddings is not None:
                hashes %= feature.num_embeddings
                hashes = hashes.astype(np.int32 if feature.num_embeddings <= 2**31 else np.int64)
            return hashes[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
        assert feature.num_embeddings is not None
        in_range = pc.and_(pc.greater_equal(values, 0), pc.less(values, feature.num_embeddings)).fill_null(False)
        if (wrong := in_range.index(False).as_py()) >= 0:
            row = wrong if offsets is None else int(np.searchsorted(offsets, wrong, side="right")) - 1
            raise RowError(
                row,
                f"column {feature.name!r}: ids must be in [0, {feature.num_embeddings}) (num_embeddings), "
                f"got {values[wrong].as_py()!r}",
            )
        kind = pa.int32() if feature.num_embeddings <= 2**31 else pa.int64()
        return np.asarray(values.cast(kind).to_numpy(zero_copy_only=False))

    def _carried(self, raw: pa.RecordBatch, name: str) -> pa.Array:
        column = raw.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_string_view(column.type) or pa.types.is_large_string(column.type):
            column = column.cast(pa.string())
        if name in (self.schema.user, self.schema.time, self.schema.day) and column.null_count:
            row = column.is_null().index(True).as_py()
            raise RowError(row, f"column {name!r}: a value is required in every row, got null")
        if name == self.schema.user and pa.types.is_integer(column.type):
            return column.cast(pa.int64())
        if name == TRUE_PROBABILITY:
            return _probability(column)
        return column

    def _keys(self, raw: pa.RecordBatch) -> dict[str, pa.Array]:
        """int64 that the split asks for: moments, and days where the log has them; hashes of users; split numbers."""
        schema, keys = self.schema, dict[str, npt.NDArray[np.int64]]()
        if self.split == "users":
            encoded = raw.column(schema.split or schema.user)
            encoded = encoded if pa.types.is_dictionary(encoded.type) else encoded.dictionary_encode()
            hashes = hash_values(encoded.dictionary)
            return {MOMENT: pa.array(hashes[encoded.indices.to_numpy(zero_copy_only=False)])}
        if self.split == "given":
            return {MOMENT: raw.column(schema.split).cast(pa.int64())}
        if schema.time is not None:
            moments, per_day = moments_of(raw.column(schema.time), schema.time_unit)
            keys = {MOMENT: moments, DAY: moments // per_day}
        if schema.day is not None:
            keys[DAY] = np.asarray(raw.column(schema.day).cast(pa.int64()).to_numpy(zero_copy_only=False))
        return {name: pa.array(values) for name, values in keys.items()}


def needs_keys(split: SplitKind, schema: LogSchema) -> bool:
    """Whether a split asks for more of a row than its number and its file."""
    return split in ("users", "given") or (split != "random" and (schema.time is not None or schema.day is not None))


def _probability(column: pa.Array) -> pa.Array:
    values = transforms.to_float64(column)
    wrong = ~((values >= 0) & (values <= 1))
    if wrong.any():
        row = int(wrong.argmax())
        raise RowError(row, f"column {TRUE_PROBABILITY!r}: must be in [0, 1], got {column[row].as_py()!r}")
    return pa.array(values.astype(np.float32))


def encode_log(
    sources: Sequence[Source], encoder: ChunkEncoder, folder: Path, pool: ThreadPoolExecutor, workers: int
) -> Iterator[Chunk]:
    """Encode all files into ``folder``, at most ``workers + 2`` batches at once, and yield the chunks in order.

    Raises:
        ValueError: the first wrong row of the log, with its place.
    """
    pending: deque[tuple[int, Future[Chunk]]] = deque()
    first_row = 0
    file_start = (0, 0)  # File of the chunk before, and number of that file's first row.

    def finish() -> Chunk:
        nonlocal first_row, file_start
        file_number, future = pending.popleft()
        if file_number != file_start[0]:
            file_start = (file_number, first_row)
        source = sources[file_number]
        try:
            chunk = dataclasses.replace(future.result(), first_row=first_row)
        except RowError as error:
            raise ValueError(f"{source.place(first_row - file_start[1] + error.row)}: {error}") from error
        first_row += chunk.num_rows
        return chunk

    try:
        for number, (file_number, load) in enumerate(_batches(sources)):
            if len(pending) >= workers + 2:
                yield finish()
            path = folder / f"{number:08}.arrow"
            pending.append((file_number, pool.submit(encoder.encode, load, path, file_number)))
        while pending:
            yield finish()
    finally:
        for _, future in pending:
            future.cancel()


def _batches(sources: Sequence[Source]) -> Iterator[tuple[int, LazyBatch]]:
    for number, source in enumerate(sources):
        for load in source.batches():
            yield number, load
