"""What results.json says of every run, whatever trained it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from recemb.config import TrainConfig
from recemb.data.manifest import Manifest
from recemb.memory import MemoryReport
from recemb.run_folder import git_state


def common_results(
    config: TrainConfig, folder: Path, memory: MemoryReport, manifest: Manifest, *, training_bytes: int
) -> dict[str, Any]:
    """Run, tables, data and code; metrics and figures of the training come besides.

    Args:
        config: of the run.
        folder: of the run.
        memory: of the tables that were evaluated.
        manifest: of the data set.
        training_bytes: values of the tables and their optimizer state, in the training that held most.
    """
    data = {**data_figures(manifest), "path": str(manifest.root.resolve())}
    if manifest.optimum is not None:
        data["optimum"] = dict(manifest.optimum)
    return {
        "task_name": config.task_name,
        "seed": config.seed,
        "run": str(folder),
        "embedding": {
            "method": config.embedding.method_name,
            "options": {key: value for key, value in config.embedding.method.items() if key[0] != "_"},
            "dim": config.embedding.embedding_dim,
            "budget": config.embedding.budget,
            "bytes": memory.serving_bytes,
            "full_bytes": memory.full_bytes,
            "ratio": memory.ratio,
            "table_bytes": memory.table_bytes,
            "index_bytes": memory.index_bytes,
            "dense_bytes": memory.dense_bytes,
            "optimizer_bytes": memory.optimizer_bytes,
            "training_bytes": training_bytes,
        },
        "data": data,
        "git": git_state(),
    }


def data_figures(manifest: Manifest) -> dict[str, Any]:
    """Source, rows of every split and number of features of a data set."""
    return {
        "source": manifest.source,
        "rows": {name: split.rows for name, split in manifest.splits.items()},
        "numeric_features": len(manifest.numeric),
        "categorical_features": len(manifest.categorical),
    }


def dense_parameters(model: nn.Module) -> int:
    """Numbers trained outside the tables and their methods."""
    embeddings = {id(parameter) for parameter in getattr(model, "embeddings", nn.Module()).parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in embeddings)
