"""The data set of the speed study: small, seeded, with a planted signal, in the layout that recemb reads.

26 categorical features with Criteo's cardinalities, the large ones capped so that all tables together have about one
million rows, Zipf-distributed ids in order of frequency; 13 numeric features. Labels are drawn from a logistic model
with an effect per id and two-way interactions, so the AUC of the true probabilities is a known ceiling.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recemb.data.manifest import (
    FILE_NAME,
    TRUE_PROBABILITY,
    CategoricalFeature,
    Manifest,
    NumericFeature,
    Split,
    describe_file,
)

logger = logging.getLogger(__name__)

NUM_NUMERIC = 13
ROW_GROUP_ROWS = 65_536
# Distinct values of C1..C26 in Criteo's Kaggle log.
CRITEO_CARDINALITIES = (
    *(1460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194),
    *(27, 14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)


def capped_cardinalities(cap: int) -> list[int]:
    """Criteo's cardinalities with the large ones cut to ``cap`` rows."""
    return [min(cardinality, cap) for cardinality in CRITEO_CARDINALITIES]


def zipf_ids(generator: np.random.Generator, num_rows: int, num_ids: int, exponent: float) -> np.ndarray:
    """(num_rows,) int64 ids in [0, num_ids), id i with probability proportional to (i + 1) ** -exponent."""
    cumulative = np.cumsum(np.arange(1, num_ids + 1, dtype=np.float64) ** -exponent)
    return np.searchsorted(cumulative, generator.random(num_rows) * cumulative[-1])


def make_dataset(
    root: Path, *, train_rows: int, validation_rows: int, cap: int = 122_700, exponent: float = 1.1, seed: int = 0
) -> Manifest:
    """Write the data set to ``root``, or load it where it lies there already with the same options.

    Args:
        root: directory to make.
        train_rows, validation_rows: rows of the two splits; the test split is empty of meaning here and left out.
        cap: rows of the largest table; 122,700 makes one million rows in all 26.
        exponent: of the Zipf law.
        seed: of everything random.
    """
    options = {
        "train_rows": train_rows,
        "validation_rows": validation_rows,
        "cap": cap,
        "exponent": exponent,
        "seed": seed,
    }
    if (root / FILE_NAME).is_file():
        manifest = Manifest.load(root)
        if dict(manifest.preparation) == options:
            return manifest
        raise ValueError(f"{root}: holds a data set made with {manifest.preparation}, asked for {options}")
    logger.info("making %s", root)
    partial = root.with_name(f"{root.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    cardinalities = capped_cardinalities(cap)
    table = _draw(train_rows + validation_rows, cardinalities, exponent, seed)
    splits = {}
    for name, start, length in (("train", 0, train_rows), ("validation", train_rows, validation_rows)):
        path = partial / name / "part-00000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(
            table.slice(start, length),
            path,
            row_group_size=ROW_GROUP_ROWS,
            compression="zstd",
            compression_level=1,
        )
        splits[name] = Split(files=(describe_file(partial, path),))
    Manifest(
        root=partial,
        source="synthetic",
        label="label",
        numeric=tuple(NumericFeature(f"I{i + 1}") for i in range(NUM_NUMERIC)),
        categorical=tuple(CategoricalFeature(f"C{i + 1}", n) for i, n in enumerate(cardinalities)),
        splits=splits,
        preparation=options,
    ).save()
    partial.replace(root)
    return Manifest.load(root)


def _draw(num_rows: int, cardinalities: list[int], exponent: float, seed: int) -> pa.Table:
    """All rows: label, numeric and categorical columns, true probability."""
    generator = np.random.default_rng(seed)
    numeric = generator.standard_normal((NUM_NUMERIC, num_rows), dtype=np.float32)
    logit = 0.15 * generator.standard_normal(NUM_NUMERIC).astype(np.float32) @ numeric
    latent_sum = np.zeros((num_rows, 4))
    latent_square = np.zeros((num_rows, 4))
    columns = {}
    for index, cardinality in enumerate(cardinalities):
        ids = zipf_ids(generator, num_rows, cardinality, exponent)
        columns[f"C{index + 1}"] = pa.array(ids.astype(np.int32))
        logit += 0.3 * generator.standard_normal(cardinality)[ids]
        latent = 0.2 * generator.standard_normal((cardinality, 4))[ids]
        latent_sum += latent
        latent_square += latent**2
    # Sum over all pairs of features of the dot product of their latent vectors, as in a factorisation machine.
    logit += 0.5 * (latent_sum**2 - latent_square).sum(axis=1)
    probability = 1 / (1 + np.exp(1.0 - logit))
    label = (generator.random(num_rows) < probability).astype(np.int8)
    return pa.table(
        {
            "label": label,
            **{f"I{i + 1}": numeric[i] for i in range(NUM_NUMERIC)},
            **columns,
            TRUE_PROBABILITY: probability.astype(np.float32),
        }
    )
