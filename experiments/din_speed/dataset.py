"""The click log of the study: histories of a chosen length, whose match with the target decides the click."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recemb.data.manifest import FILE_NAME, CategoricalFeature, Manifest, Split, describe_file

# Goods and categories of Amazon Electronics in the paper.
NUM_ITEMS, NUM_CATEGORIES, NUM_DEVICES = 63_001, 801, 8


def make_dataset(
    root: Path, *, shortest: int, longest: int, train_rows: int, validation_rows: int = 10_000
) -> Manifest:
    """Write the data set to ``root``, or load it where it lies there already.

    Args:
        root: directory to make.
        shortest, longest: history lengths, in events, are uniform between them, both included.
        train_rows, validation_rows: rows of the two splits.
    """
    options = {"shortest": shortest, "longest": longest, "train_rows": train_rows, "validation_rows": validation_rows}
    if (root / FILE_NAME).is_file():
        manifest = Manifest.load(root)
        if dict(manifest.preparation) == options:
            return manifest
        raise ValueError(f"{root}: holds a data set made with {manifest.preparation}, asked for {options}")
    unfinished = root.with_name(f"{root.name}.partial-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    table = _draw(train_rows + validation_rows, shortest, longest)
    splits = {}
    for name, start, length in (("train", 0, train_rows), ("validation", train_rows, validation_rows)):
        path = unfinished / name / "part-00000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(table.slice(start, length), path, row_group_size=65_536, compression="zstd", compression_level=1)
        splits[name] = Split(files=(describe_file(unfinished, path),))
    features = (
        CategoricalFeature("item", NUM_ITEMS),
        CategoricalFeature("category", NUM_CATEGORIES),
        CategoricalFeature("device", NUM_DEVICES),
        CategoricalFeature("item_history", NUM_ITEMS, "sequence", "item"),
        CategoricalFeature("category_history", NUM_CATEGORIES, "sequence", "category"),
    )
    Manifest(unfinished, "synthetic", "label", (), features, splits, preparation=options).save()
    unfinished.replace(root)
    return Manifest.load(root)


def _draw(rows: int, shortest: int, longest: int) -> pa.Table:
    generator = np.random.default_rng(0)

    def items(count: int) -> np.ndarray:
        # From 1: id 0 is padding to the peers. Squared, so that some are frequent.
        return 1 + ((NUM_ITEMS - 1) * generator.random(count) ** 2).astype(np.int64)

    def category(ids: np.ndarray) -> np.ndarray:
        return 1 + ids % (NUM_CATEGORIES - 1)

    lengths = generator.integers(shortest, longest + 1, rows)
    history, target = items(int(lengths.sum())), items(rows)
    owners = np.repeat(np.arange(rows), lengths)
    matches = np.bincount(owners, category(history) == category(target)[owners], rows)
    probability = 1 / (1 + np.exp(1.5 - 2.5 * (matches > 0)))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pa.table(
        {
            "label": (generator.random(rows) < probability).astype(np.int8),
            "item": target.astype(np.int32),
            "category": category(target).astype(np.int32),
            "device": generator.integers(0, NUM_DEVICES, rows).astype(np.int32),
            "item_history": pa.ListArray.from_arrays(offsets, pa.array(history)),
            "category_history": pa.ListArray.from_arrays(offsets, pa.array(category(history))),
        }
    )
