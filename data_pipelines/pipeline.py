"""From raw log files to an encoded data set: the steps every pipeline shares.

1. Read every file once; check, transform, hash or give provisional ids; keep typed chunks on disk (``encode``).
2. Find the split's boundaries (``splitting``), count provisional ids of train rows, rank them (``vocabulary``).
3. Write the splits' Parquet files with final ids, in parallel (``parts``), the manifest last.

Memory does not grow with rows. It is the vocabularies, about 120 bytes for each distinct value of the log (80 more
while its table is ranked, 12 from then on), plus about 100 MB for each worker (three batches of 131,072 rows or 16 MB
of text in various stages), plus 300 MB. So 0.7 GB for 5 million Criteo-shaped rows on 2 workers, about 4.5 GB for the
34 million values of the Criteo Kaggle log; the Terabyte log's 900 million values ask for hashed ids, which take no
vocabulary. The exception is the optimum of a synthetic log: 20 bytes for each test row. Disk: about 4 bytes a cell (8
when hashed) beside the result, until the end.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.encode import Chunk, ChunkEncoder, encode_log, needs_keys
from data_pipelines.parts import Layout, PartWriter, count_train, lay_out
from data_pipelines.schema import LogSchema
from data_pipelines.sources import Source, check_distinct
from data_pipelines.splitting import SPLITS, RowKeys, SplitRule, assign
from data_pipelines.vocabulary import OUT_OF_VOCABULARY, Vocabulary, rank
from data_pipelines.workspace import check_target, workspace
from recemb.data.label_classes import only_label
from recemb.data.manifest import TRUE_PROBABILITY, CategoricalFeature, Manifest, NumericFeature, Split
from recemb.evaluation.metrics import auc, log_loss

logger = logging.getLogger(__name__)

VOCABULARY_FOLDER = "vocabulary"
_CHUNK_FOLDER = "chunks"
_SECONDS_BETWEEN_REPORTS = 10.0


def prepare_log(
    sources: Sequence[Source],
    schema: LogSchema,
    out: str | Path,
    *,
    source_name: str,
    split: SplitRule,
    overwrite: bool = False,
    workers: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Manifest:
    """Encode a log into the directory ``out``.

    Args:
        sources: raw files; for splits by time, oldest first.
        schema: their columns.
        out: directory to make; its parent is made too.
        source_name: kind of log, for the manifest.
        split: how rows are divided.
        overwrite: replace a data set that lies at ``out``.
        workers: threads beside Arrow's and Polars' own; None: one for each core this process may use.
        options: of the command, for the manifest.

    Returns:
        The manifest of the finished data set.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: with file, line or row group, row and column, what is required
            and what came.
        OSError: no space left.
    """
    out = Path(out)
    workers = workers or len(os.sched_getaffinity(0))
    started = time.perf_counter()
    check_target(out, overwrite=overwrite)
    _check_inputs(sources, schema, split)
    with workspace(out, overwrite=overwrite) as root, ThreadPoolExecutor(workers) as pool:
        _check_space(sources, root)
        has_keys = needs_keys(split.kind, schema)
        encoder = ChunkEncoder(schema, split=split.kind if has_keys else None)
        (root / _CHUNK_FOLDER).mkdir()
        chunks = list(_reported(encode_log(sources, encoder, root / _CHUNK_FOLDER, pool, workers), started))
        if not chunks:
            raise ValueError(f"{sources[0].path}: the log has no rows")
        layout = _lay_out(chunks, split, needs_keys=has_keys)
        vocabularies = _vocabularies(root, schema, layout, encoder, pool)
        splits, unknown = PartWriter(root, schema, layout, vocabularies).write(pool)
        shutil.rmtree(root / _CHUNK_FOLDER)
        manifest = Manifest(
            root=root,
            source=source_name,
            label=schema.label,
            numeric=_numeric_features(schema),
            categorical=_categorical_features(schema, vocabularies),
            splits=splits,
            user=schema.user,
            time=schema.time or schema.day,
            preparation={
                "options": dict(options or {}),
                "raw_files": [str(source.path) for source in sources],
                "split": {**dataclasses.asdict(split), "fractions": list(split.fractions)},
                "missing_numbers": dict(sum((chunk.missing for chunk in chunks), Counter[str]())),
                "out_of_vocabulary_share": _shares(unknown, splits),
            },
            optimum=_optimum(root, splits["test"], schema) if TRUE_PROBABILITY in schema.extra else None,
        )
        manifest.save()
    rows = {name: entry.rows for name, entry in splits.items()}
    logger.info("%s: %s rows in %.1f s", source_name, rows, time.perf_counter() - started)
    manifest = dataclasses.replace(manifest, root=out)
    for name in SPLITS[1:]:
        if (label := only_label(manifest, name)) is not None:
            logger.warning(
                "%s: all %d rows of split %s have label %d; training needs both, so divide the log otherwise",
                out,
                rows[name],
                name,
                label,
            )
    return manifest


def _lay_out(chunks: Sequence[Chunk], split: SplitRule, *, needs_keys: bool) -> Layout:
    def keys() -> Iterator[RowKeys]:
        return (chunk.keys(needs_keys=needs_keys) for chunk in chunks)

    return lay_out(chunks, assign(split, keys), needs_keys=needs_keys)


def _vocabularies(
    root: Path, schema: LogSchema, layout: Layout, encoder: ChunkEncoder, pool: ThreadPoolExecutor
) -> dict[str, Vocabulary]:
    """Count, rank and save every table's values; one table at a time beside the hash tables of those that follow."""
    num_values = {table: len(index) for table, index in encoder.indices.items()}
    counts = count_train(layout, schema.features, num_values, pool)
    min_counts = {feature.table: feature.min_count for feature in schema.features}
    vocabularies = {}
    for table in list(counts):
        # Popped, so that a table's texts and hash table are freed before the next one is ranked.
        ranked = rank(encoder.indices.pop(table), counts.pop(table), min_counts[table])
        ranked.save(root / VOCABULARY_FOLDER / f"{table}.parquet")
        vocabularies[table] = ranked.without_values()
    logger.info("%d ids in %d vocabularies", sum(map(len, vocabularies.values())), len(vocabularies))
    return vocabularies


def _check_inputs(sources: Sequence[Source], schema: LogSchema, split: SplitRule) -> None:
    check_distinct([source.path for source in sources])
    for source in sources:
        source.check()
    if split.kind == "random" and schema.sequences:
        names = [column.name for column in schema.sequences]
        raise ValueError(
            f"{sources[0].path}: split random is not for histories, sequences {names}: those of train rows hold what "
            "test rows ask for. Use split users (with a user column) or time (with a time column, or rows in the order "
            "of time); a list that is no history is of kind list"
        )
    if split.kind == "users" and schema.user is None and schema.split is None:
        raise ValueError(f"{sources[0].path}: split users needs a user column, and the log names none")
    if split.kind == "given" and schema.split is None:
        raise ValueError(f"{sources[0].path}: split given needs a column with the split of every row")
    if split.kind == "last-day" and schema.time is None and schema.day is None and len(sources) < 2:
        raise ValueError(
            f"{sources[0].path}: split last-day needs days: several files (one a day, oldest first) or a time or day "
            "column; use split time with fractions"
        )


def _check_space(sources: Sequence[Source], root: Path) -> None:
    """Refuse what cannot fit: chunks and result together are more than half the raw bytes for every kind of log."""
    needed = sum(source.path.stat().st_size for source in sources) // 2
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(
            f"{root.parent}: at least {needed / 1e9:.2f} GB of free disk are required to prepare "
            f"{2 * needed / 1e9:.2f} GB of raw files, {free / 1e9:.2f} GB are free"
        )


def _reported(chunks: Iterator[Chunk], started: float) -> Iterator[Chunk]:
    reported = started
    for chunk in chunks:
        now = time.perf_counter()
        if now - reported > _SECONDS_BETWEEN_REPORTS:
            reported, rows = now, chunk.first_row + chunk.num_rows
            logger.info("read %d rows, %.0f rows/s", rows, rows / (now - started))
        yield chunk


def _numeric_features(schema: LogSchema) -> tuple[NumericFeature, ...]:
    return tuple(
        NumericFeature(column.name, "none" if column.transform == "none" else "log1p")
        for column in schema.numeric
        if column.keeps_number
    )


def _categorical_features(schema: LogSchema, vocabularies: Mapping[str, Vocabulary]) -> tuple[CategoricalFeature, ...]:
    features = []
    for column in schema.features:
        vocabulary = vocabularies.get(column.table) if column.encoding == "vocabulary" else None
        features.append(
            CategoricalFeature(
                name=column.name,
                num_embeddings=column.num_embeddings if vocabulary is None else len(vocabulary),
                kind=column.kind,
                table=column.table,
                vocabulary=None if vocabulary is None else f"{VOCABULARY_FOLDER}/{column.table}.parquet",
                min_count=column.min_count,
                out_of_vocabulary=None if vocabulary is None else OUT_OF_VOCABULARY,
                max_length=column.max_length,
                events=column.events,
            )
        )
    return tuple(features)


def _shares(unknown: Mapping[str, Counter[str]], splits: Mapping[str, Split]) -> dict[str, dict[str, float]]:
    """Entries with id 0 per row, by split and feature."""
    return {
        name: {feature: round(count / splits[name].rows, 6) for feature, count in sorted(counts.items())}
        for name, counts in unknown.items()
    }


def _optimum(root: Path, test: Split, schema: LogSchema) -> dict[str, float]:
    """AUC and log loss of the known probabilities on the test split: the ceiling. 20 bytes of memory a test row."""
    columns = [schema.label, TRUE_PROBABILITY]
    table = pa.concat_tables([pq.read_table(root / file.path, columns=columns) for file in test.files])
    labels = table[schema.label].to_numpy()
    probabilities = table[TRUE_PROBABILITY].to_numpy().astype(np.float64)
    return {"auc": auc(labels, probabilities), "logloss": log_loss(labels, probabilities)}
