"""One fbgemm table-batched kernel for all tables, fed from Parquet: what the TorchRec and the bare loop rows share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    OptimType,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from protocol import CATEGORICAL, EMBEDDING_DIM, EMBEDDING_LEARNING_RATE, NUMERIC, column, parquet_file
from torch import Tensor


def raw_kernel(cardinalities: list[int]) -> SplitTableBatchedEmbeddingBagsCodegen:
    """All tables in one kernel, row-wise Adagrad inside backward(), TorchRec's initialisation."""
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, EMBEDDING_DIM, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in cardinalities],
        optimizer=OptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=EMBEDDING_LEARNING_RATE,
        eps=1e-8,
    )
    for rows, weights in zip(cardinalities, kernel.split_embedding_weights(), strict=True):
        weights.uniform_(-(rows**-0.5), rows**-0.5)
    return kernel


def stream(data: Path, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(B, 13) float32 numeric, (26, B) int64 ids, (B,) float32 labels; one row group in memory, file order."""
    file = pq.ParquetFile(parquet_file(data, split))
    left: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    for index in range(file.num_row_groups):
        group = file.read_row_group(index, columns=["label", *NUMERIC, *CATEGORICAL], use_threads=False)
        numeric = np.stack([column(group, name) for name in NUMERIC], axis=1)
        ids = np.stack([column(group, name) for name in CATEGORICAL]).astype(np.int64)
        label = column(group, "label").astype(np.float32)
        if left is not None:
            numeric = np.concatenate([left[0], numeric])
            ids = np.concatenate([left[1], ids], axis=1)
            label = np.concatenate([left[2], label])
        last = index == file.num_row_groups - 1
        full = len(label) if last else len(label) // batch_size * batch_size
        for start in range(0, full, batch_size):
            rows = slice(start, min(start + batch_size, full))
            yield (
                torch.from_numpy(numeric[rows]),
                torch.from_numpy(np.ascontiguousarray(ids[:, rows])),
                torch.from_numpy(label[rows]),
            )
        left = numeric[full:], ids[:, full:], label[full:]
