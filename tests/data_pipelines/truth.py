"""What a preparation must come to, in plain Python loops over rows: independent of the library's engine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recemb.data.manifest import Manifest

Row = dict[str, Any]


def criteo_names() -> list[str]:
    return ["label", *(f"I{number}" for number in range(1, 14)), *(f"C{number}" for number in range(1, 27))]


def criteo_rows(count: int, seed: int = 0, *, distinct: int = 12) -> list[Row]:
    """Rows with missing values, skewed categories of odd lengths, negatives and large counts."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row: Row = {"label": int(random.random() < 0.3)}
        for number in range(1, 14):
            row[f"I{number}"] = None if random.random() < 0.2 else int(random.lognormal(2, 2)) - 2
        for number in range(1, 27):
            value = int(distinct ** random.random() * number) % distinct
            row[f"C{number}"] = None if random.random() < 0.1 else f"{value:x}" * (1 + value % 3)
        rows.append(row)
    return rows


def write_tsv(path: Path, rows: Sequence[Row]) -> Path:
    lines = ["\t".join("" if row[name] is None else str(row[name]) for name in criteo_names()) for row in rows]
    content = ("\n".join(lines) + "\n").encode()
    if path.suffix == ".gz":
        import gzip

        content = gzip.compress(content)
    path.write_bytes(content)
    return path


def write_parquet(path: Path, rows: Sequence[Row], names: Mapping[str, str] | None = None, **settings: Any) -> Path:
    names = names or {}
    table = pa.table({names.get(name, name): [row[name] for row in rows] for name in rows[0]})
    pq.write_table(table, path, **settings)
    return path


def vocabulary(values: Sequence[Any], min_count: int) -> dict[Any, int]:
    """Raw value -> id: 1.. by descending count, then value, missing first."""
    counts = Counter(values)
    kept = [value for value, count in counts.items() if count >= min_count]
    kept.sort(key=lambda value: (-counts[value], value is not None, 0 if value is None else value))
    return {value: position for position, value in enumerate(kept, 1)}


def bucket(value: int | None) -> int | None:
    if value is None:
        return None
    return math.floor(math.log(value) ** 2) if value > 2 else int(value)


def log1p(value: int | None) -> np.float32:
    return np.float32(math.log1p(max(value or 0, 0)))


def read(manifest: Manifest, split: str) -> dict[str, list[Any]]:
    """All rows of a split, by column."""
    return pa.concat_tables([pq.read_table(path) for path in manifest.files(split)]).to_pydict()


def read_all(manifest: Manifest) -> dict[str, dict[str, list[Any]]]:
    return {split: read(manifest, split) for split in manifest.splits}


def stored_vocabulary(manifest: Manifest, feature: str) -> dict[str, list[Any]]:
    (path,) = [item.vocabulary for item in manifest.categorical if item.name == feature]
    assert path is not None
    return pq.read_table(manifest.root / path).to_pydict()


def files_of(root: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative path."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
