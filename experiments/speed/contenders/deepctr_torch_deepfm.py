"""DeepCTR-Torch's DeepFM: the library has no DLRM. Trained from numpy arrays in RAM, as its documentation does.

In its favour: no L2 penalty (its default adds the norm of all tables to every step), ``verbose=0`` (otherwise it
computes metrics on every batch), Parquet read before the clock starts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import requests
from protocol import (
    CATEGORICAL,
    EMBEDDING_DIM,
    NUMERIC,
    EpochClock,
    cardinalities,
    column,
    labels,
    parquet_file,
    parse_options,
    report,
)


def _offline(*_: object, **__: object) -> None:
    raise ConnectionError("the benchmark runs offline")


# The library asks a package registry for its newest version when it is imported.
requests.get = _offline

from deepctr_torch.inputs import DenseFeat, SparseFeat  # noqa: E402
from deepctr_torch.models import DeepFM  # noqa: E402


def read(data: Path, split: str) -> dict[str, np.ndarray]:
    file = pq.ParquetFile(parquet_file(data, split))
    return {name: column(file.read(columns=[name], use_threads=False), name) for name in [*CATEGORICAL, *NUMERIC]}


def main() -> None:
    options = parse_options("fp32")
    columns = [
        *(
            SparseFeat(name, rows, embedding_dim=EMBEDDING_DIM)
            for name, rows in zip(CATEGORICAL, cardinalities(options.data), strict=True)
        ),
        *(DenseFeat(name, 1) for name in NUMERIC),
    ]
    train, validation = read(options.data, "train"), read(options.data, "validation")
    model = DeepFM(
        columns,
        columns,
        dnn_hidden_units=(256, 128),
        l2_reg_linear=0,
        l2_reg_embedding=0,
        seed=options.seed,
        device="cpu",
    )
    model.compile("adam", "binary_crossentropy")
    truth, clock = labels(options.data, "train"), EpochClock()
    for epoch in range(options.epochs):
        clock.start()
        model.fit(train, truth, batch_size=options.batch_size, epochs=1, verbose=0)
        clock.stop(len(truth))
        if epoch == 0:
            scores = model.predict(validation, options.batch_size)[:, 0]
    report(options, clock, labels(options.data, "validation"), scores)


if __name__ == "__main__":
    main()
