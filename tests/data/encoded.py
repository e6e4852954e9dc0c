"""Writes a small encoded data set (manifest, splits, vocabularies) with learnable labels, for other tests too.

Shapes: N rows of the whole log, L entries of all its lists.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recemb.data.manifest import (
    TRUE_PROBABILITY,
    CategoricalFeature,
    DataFile,
    Manifest,
    NumericFeature,
    Split,
    describe_file,
)

SPLIT_FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}
LONGEST_LIST = 5


def write_encoded(
    root: Path,
    rows: int = 2000,
    *,
    numeric: int = 3,
    categorical: Sequence[int] = (20, 100, 1000),
    lists: Sequence[int] = (),
    sequences: Sequence[int] = (),
    max_length: int | None = None,
    num_users: int = 0,
    seed: int = 0,
    row_group_rows: int = 256,
    files_per_split: int = 1,
    split_fractions: Mapping[str, float] = SPLIT_FRACTIONS,
) -> Manifest:
    """Write a data set below ``root`` and return its manifest.

    The first ``0.8 * rows`` rows are train, then validation, then test. Numeric features are ``I1..``, single
    categorical ones ``C1..``, lists ``L1..`` and sequences ``S1..``; a row's lists hold 0 to 5 ids. Id 0 (out of
    vocabulary) and the last id both occur in train where it has rows enough; ids are ordered by train count. Labels are
    drawn from the logistic function of a sum of per-id effects and the numeric features, kept as ``true_probability``.

    Args:
        categorical, lists, sequences: num_embeddings of each feature of that kind.
        max_length: written to the manifest for lists and sequences; the files keep their whole lists.
        num_users: 0 for no user column, else users ``0..num_users - 1`` in an int64 column ``user``.
    """
    generator = np.random.default_rng(seed)
    bounds = np.round(np.cumsum([0.0, *split_fractions.values()]) * rows).astype(int)
    train_rows = int(bounds[1])
    logit_N = np.zeros(rows)
    columns: dict[str, pa.Array] = {}
    counts: dict[str, np.ndarray] = {}
    features: list[CategoricalFeature] = []
    for kind, prefix, sizes in (("single", "C", categorical), ("list", "L", lists), ("sequence", "S", sequences)):
        for position, size in enumerate(sizes):
            name = f"{prefix}{position + 1}"
            lengths_N = np.ones(rows, np.int64) if kind == "single" else generator.integers(0, LONGEST_LIST + 1, rows)
            ids_L, counts[name] = _draw_ids(generator, size, lengths_N, train_rows)
            row_L = np.repeat(np.arange(rows), lengths_N)
            effects = generator.normal(0, 1 / np.sqrt(1 + len(sizes)), size)
            logit_N += np.bincount(row_L, effects[ids_L], rows) / np.maximum(lengths_N, 1)
            columns[name] = _column(ids_L, None if kind == "single" else lengths_N)
            features.append(
                CategoricalFeature(
                    name,
                    size,
                    kind,
                    vocabulary=f"vocabulary/{name}.parquet",
                    out_of_vocabulary=0,
                    max_length=None if kind == "single" else max_length,
                )
            )
    for position in range(numeric):
        values_N = generator.normal(size=rows).astype(np.float32)
        logit_N += generator.normal(0, 0.5) * values_N
        columns[f"I{position + 1}"] = pa.array(values_N)
    probability_N = (1 / (1 + np.exp(-(logit_N - logit_N.mean() - 0.5)))).astype(np.float32)
    labels_N = (generator.random(rows) < probability_N).astype(np.int8)
    columns = {"label": pa.array(labels_N), **columns, TRUE_PROBABILITY: pa.array(probability_N)}
    if num_users:
        columns["user"] = pa.array(generator.integers(0, num_users, rows))
    table = pa.table(columns)

    root.mkdir(parents=True, exist_ok=True)
    _write_vocabularies(root, counts)
    splits = {
        name: _write_split(root, name, table.slice(first, last - first), files_per_split, row_group_rows)
        for name, first, last in zip(split_fractions, bounds, bounds[1:], strict=False)
    }
    manifest = Manifest(
        root=root,
        source="synthetic",
        label="label",
        numeric=tuple(NumericFeature(f"I{position + 1}") for position in range(numeric)),
        categorical=tuple(features),
        splits=splits,
        user="user" if num_users else None,
    )
    manifest.save()
    return manifest


def _draw_ids(
    generator: np.random.Generator, size: int, lengths_N: np.ndarray, train_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """(L,) ids, Zipf-like, relabelled so that ids 1.. descend by train count; and (size,) train counts."""
    weights = 1 / (1 + np.arange(size))
    ids_L = generator.choice(size, int(lengths_N.sum()), p=weights / weights.sum())
    if len(ids_L) > 1:
        # The two ends of the range always occur: mistakes of bounds show there.
        ids_L[0], ids_L[1] = 0, size - 1
    train_entries = int(lengths_N[:train_rows].sum())
    counts = np.bincount(ids_L[:train_entries], minlength=size)
    order = np.concatenate([[0], 1 + np.argsort(-counts[1:], kind="stable")])
    relabel = np.empty(size, np.int64)
    relabel[order] = np.arange(size)
    return relabel[ids_L], counts[order]


def _column(ids_L: np.ndarray, lengths_N: np.ndarray | None) -> pa.Array:
    values = pa.array(ids_L.astype(np.int32))
    if lengths_N is None:
        return values
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _write_vocabularies(root: Path, counts: Mapping[str, np.ndarray]) -> None:
    (root / "vocabulary").mkdir(exist_ok=True)
    for name, count in counts.items():
        values = [None, *(f"{name}={position}" for position in range(1, len(count)))]
        vocabulary = pa.table({"value": pa.array(values, pa.string()), "train_count": pa.array(count, pa.int64())})
        pq.write_table(vocabulary, root / "vocabulary" / f"{name}.parquet")


def _write_split(root: Path, name: str, table: pa.Table, num_files: int, row_group_rows: int) -> Split:
    (root / name).mkdir(exist_ok=True)
    files: list[DataFile] = []
    bounds = np.linspace(0, table.num_rows, num_files + 1).astype(int)
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        path = root / name / f"part-{number:05d}.parquet"
        pq.write_table(table.slice(first, last - first), path, row_group_size=row_group_rows, compression="zstd")
        files.append(describe_file(root, path))
    return Split(files=tuple(files))


def rewrite_column(manifest: Manifest, split: str, column: str, values: pa.Array, *, file: int = 0) -> Manifest:
    """Replace one column of one file (same rows, same row groups) and return the manifest that matches.

    This is how tests damage a data set: the files agree with the manifest, the values do not keep its rules.
    """
    path = manifest.files(split)[file]
    source = pq.ParquetFile(path)
    row_group_rows = max(1, source.metadata.row_group(0).num_rows)
    table = source.read()
    table = table.set_column(table.schema.get_field_index(column), column, values)
    pq.write_table(table, path, row_group_size=row_group_rows, compression="zstd")
    entries = list(manifest.splits[split].files)
    entries[file] = describe_file(manifest.root, path)
    return replace_split(manifest, split, entries)


def replace_split(manifest: Manifest, split: str, files: Sequence[DataFile]) -> Manifest:
    """The manifest with other files in one split, saved."""
    splits = {**manifest.splits, split: Split(files=tuple(files))}
    changed = dataclasses.replace(manifest, splits=splits)
    changed.save()
    return changed
