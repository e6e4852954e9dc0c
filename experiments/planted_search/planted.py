"""A click log of which it is known what a search should drop: ids and columns that carry no signal.

The logit is the sum of the products of all pairs of latent vectors: one per field and id, and a fixed one. In fields
with dead rows the vectors of half of the ids are zero; in narrow fields only the first quarter of the dimensions is
not. Ids are drawn uniformly, so that nothing but the labels tells which are which.

    field        f0  f1  f2  f3  f4  f5  f6  f7
    dead rows     x   x           x   x
    narrow        x   x   x   x
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_pipelines import parquet
from data_pipelines.schema import CategoricalColumn, LogSchema, NumericColumn
from data_pipelines.splitting import SplitRule
from recemb.data.manifest import Manifest
from recemb.plan import CompressionPlan, TablePlan

WITH_DEAD_ROWS = ("f0", "f1", "f4", "f5")
NARROW = ("f0", "f1", "f2", "f3")
FIELDS = tuple(f"f{index}" for index in range(8))
IDS = 40
DIM = 8
NARROW_DIM = 2
# Every coordinate of a vector that all others are multiplied with too: effects of single ids, by which training starts.
# A model with a numeric feature, here of noise, has such a vector: that of the bottom layers.
ANCHOR = 1.0
# Standard deviation over rows.
LOGIT_STD = 4.0


@dataclass(frozen=True)
class Planted:
    """The log and what is known of it.

    Args:
        manifest: of the encoded log.
        truth: the plan that keeps exactly what carries signal.
    """

    manifest: Manifest
    truth: CompressionPlan


def make(folder: Path, *, rows: int = 200_000, seed: int = 0) -> Planted:
    """Draw and encode the log in ``folder``, or take the one that is there."""
    generator = np.random.default_rng(seed)
    dead = {name: generator.permutation(IDS) < IDS // 2 for name in FIELDS}
    vectors = {name: generator.standard_normal((IDS, DIM)) for name in FIELDS}
    for name in WITH_DEAD_ROWS:
        vectors[name][dead[name]] = 0
    for name in NARROW:
        vectors[name][:, NARROW_DIM:] = 0
    if not (folder / "manifest.json").is_file():
        ids = {name: generator.integers(0, IDS, rows) for name in FIELDS}
        total = sum(vectors[name][ids[name]] for name in FIELDS)
        squares = sum((vectors[name][ids[name]] ** 2).sum(1) for name in FIELDS)
        logits = ((total**2).sum(1) - squares) / 2 + ANCHOR * total.sum(1)
        logits = (logits - logits.mean()) * (LOGIT_STD / logits.std())
        labels = (generator.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.int8)
        _encode(folder, labels, ids, generator.standard_normal(rows).astype(np.float32))
    manifest = Manifest.load(folder)
    return Planted(manifest, _truth(manifest, dead))


def _encode(folder: Path, labels: np.ndarray, ids: dict[str, np.ndarray], noise: np.ndarray) -> None:
    columns = {name: pa.array([f"v{value}" for value in values]) for name, values in ids.items()}
    schema = LogSchema(
        label="label", numeric=(NumericColumn("noise"),), categorical=tuple(CategoricalColumn(name) for name in FIELDS)
    )
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw.parquet"
        pq.write_table(pa.table({"label": labels, "noise": noise, **columns}), raw)
        parquet.prepare([raw], folder, schema=schema, split=SplitRule(fractions=(0.7, 0.2, 0.1)), workers=1)


def _truth(manifest: Manifest, dead: dict[str, np.ndarray]) -> CompressionPlan:
    """Ids are given out by the preparation; its vocabularies say which value each stands for."""
    tables = {}
    for feature in manifest.categorical:
        assert feature.vocabulary is not None and feature.num_embeddings is not None
        values = pq.read_table(manifest.root / feature.vocabulary)["value"].to_pylist()
        # No value: no row of the log has it.
        alive = [value is not None and not _is_dead(feature.name, value, dead) for value in values]
        width = NARROW_DIM if feature.name in NARROW else DIM
        tables[f"t_{feature.name}"] = TablePlan(
            feature.num_embeddings,
            DIM,
            kept_rows=torch.tensor(alive),
            kept_columns=torch.arange(DIM).unsqueeze(0) < width,
        )
    return CompressionPlan(tables, "the planted truth")


def _is_dead(name: str, value: str, dead: dict[str, np.ndarray]) -> bool:
    return name in WITH_DEAD_ROWS and bool(dead[name][int(value[1:])])
