"""recemb as a user runs it: its shuffled loader streaming Parquet, its DIN, ``prepare`` and its training loop."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

# Not installed, so that the sources beside this file are what is measured.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from settings import ATTENTION_LAYERS, DENSE_LEARNING_RATE, EMBEDDING_DIM, EMBEDDING_LEARNING_RATE, LAYERS
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingConfig

from recemb.allocator import tune_allocators
from recemb.assembly import ModelInputs
from recemb.checkpoint import Checkpoints
from recemb.collection import CompressedEmbeddingCollection
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.methods.full import Full
from recemb.models.din import DIN
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from recemb.training.loop import LoopSettings, TrainingLoop
from recemb.training.metrics_log import MetricsLog
from recemb.training.progress import Progress
from recemb.training.schedule import LearningRateSchedule
from recemb.training.stopping import EarlyStopping

from protocol import EpochClock, labels, parse_options, report  # isort: skip


class ClockedCheckpoints(Checkpoints):
    """Writes nothing: the place after validation where the next epoch of training begins."""

    def __init__(self, clock: EpochClock) -> None:
        self._clock = clock

    def save(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any], *, best_step: int | None) -> Path:
        self._clock.start()
        return Path()


def build(manifest: Manifest, pooling: str) -> DIN:
    """DIN, or its base model with ``pooling="sum"``, over full tables."""
    inputs = ModelInputs.of(manifest)
    tables = [
        EmbeddingConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=table.feature_names,
        )
        for table in inputs.logical_tables(EMBEDDING_DIM)
    ]
    return DIN(
        CompressedEmbeddingCollection(tables, Full, check_ids=False),
        num_dense=len(inputs.numeric),
        histories=inputs.histories,
        bags=inputs.bags,
        layers=[*LAYERS, 1],
        attention_layers=ATTENTION_LAYERS,
        pooling=pooling,
    )


def main() -> None:
    options = parse_options("attention", "sum")
    manifest = Manifest.load(options.data)
    model, optimizer = prepare(
        build(manifest, options.variant),
        EmbeddingOptimizer("rowwise_adagrad", learning_rate=EMBEDDING_LEARNING_RATE),
        partial(torch.optim.Adam, lr=DENSE_LEARNING_RATE, fused=True),
    )
    tune_allocators()
    train = ParquetLoader(manifest, "train", batch_size=options.batch_size, shuffle=True, seed=options.seed)
    clock = EpochClock()

    def validate() -> dict[str, float]:
        clock.stop(train.num_rows)
        return {"auc": 0.5}

    total_steps = options.epochs * len(train)
    loop = TrainingLoop(
        model,
        optimizer,
        train,
        settings=LoopSettings(total_steps=total_steps, batch_size=options.batch_size),
        schedule=LearningRateSchedule(total_steps),
        stopping=EarlyStopping(patience=None),
        validate=validate,
        checkpoints=ClockedCheckpoints(clock),
        device=torch.device("cpu"),
        description={},
    )
    folder = options.scratch / "recemb"
    folder.mkdir(exist_ok=True)
    with MetricsLog(folder) as log, Progress(options.epochs * train.num_rows) as progress:
        clock.start()
        loop.run(log, progress)
    model.eval()
    loader = ParquetLoader(manifest, "validation", batch_size=options.batch_size)
    with torch.no_grad():
        scores: list[Tensor] = [model(batch.dense, batch.sparse) for batch in loader]
    report(options, clock, labels(options.data, "validation"), torch.cat(scores).numpy())


if __name__ == "__main__":
    main()
