"""Encoded data sets read back as raw values, to compare with plain loops over a log."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from recemb.data.manifest import Manifest
from tests.data_pipelines import truth

Row = dict[str, Any]
# What has no id of its own.
UNKNOWN = "?"


def decoded(manifest: Manifest) -> dict[str, list[Row]]:
    """Rows by split, ids replaced by the values of their vocabulary (id 0 by UNKNOWN)."""
    vocabularies = {
        feature.name: [UNKNOWN, *pq.read_table(manifest.root / feature.vocabulary)["value"].to_pylist()[1:]]
        for feature in manifest.categorical
        if feature.vocabulary is not None
    }
    splits = {}
    for split, columns in truth.read_all(manifest).items():
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for row in rows:
            for name, values in vocabularies.items():
                ids = row[name]
                row[name] = [values[i] for i in ids] if isinstance(ids, list) else values[ids]
        splits[split] = rows
    return splits


def known_in_train(manifest: Manifest, splits: dict[str, list[Row]]) -> dict[str, Counter[Any]]:
    """Occurrences in the train rows by table, as the decoded rows have them."""
    counts: dict[str, Counter[Any]] = {}
    for feature in manifest.categorical:
        counter = counts.setdefault(feature.table, Counter())
        for row in splits["train"]:
            values = row[feature.name]
            counter.update(values if isinstance(values, list) else [values])
    return counts


def check_vocabularies(manifest: Manifest, splits: dict[str, list[Row]]) -> None:
    """Every vocabulary holds the values of train rows and their counts, nothing else."""
    counts = known_in_train(manifest, splits)
    for feature in manifest.categorical:
        assert feature.vocabulary is not None
        table = pq.read_table(manifest.root / feature.vocabulary).to_pydict()
        stored = dict(zip(table["value"][1:], table["train_count"][1:], strict=True))
        expected = counts[feature.table]
        assert stored == {value: count for value, count in expected.items() if value != UNKNOWN}


def masked(rows: list[Row], manifest: Manifest) -> list[Row]:
    """Raw rows with what the vocabularies do not know replaced by UNKNOWN."""
    known = {
        feature.name: set(pq.read_table(manifest.root / feature.vocabulary)["value"].to_pylist()[1:])
        for feature in manifest.categorical
        if feature.vocabulary is not None
    }

    def value(name: str, raw: Any) -> Any:
        return raw if raw in known[name] else UNKNOWN

    return [
        {
            name: raw
            if name not in known
            else [value(name, entry) for entry in raw]
            if isinstance(raw, list)
            else value(name, raw)
            for name, raw in row.items()
        }
        for row in rows
    ]


def as_set(rows: list[Row]) -> Counter[str]:
    """Rows without their order."""
    return Counter(repr(sorted(row.items())) for row in rows)


def shared_data(name: str) -> Path:
    """A file of the shared real logs; the test is skipped where it is absent."""
    default = Path(__file__).parents[2].parent / "shared" / "data"
    path = Path(os.environ.get("RECEMB_SHARED_DATA", default)) / name
    if not path.is_file():
        pytest.skip(f"{name} is not here; RECEMB_SHARED_DATA names the folder of real logs")
    return path
