"""recemb as a user runs it: its loader (shuffled, streamed from Parquet), its DLRM, ``prepare`` and its training loop.

The loop's own bookkeeping is timed (schedule, NaN check, metrics.jsonl, progress); validation and checkpoints are not,
as for the other contenders.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

# Not installed, so that the sources beside this file are what is measured.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from protocol import (
    BOTTOM_LAYERS,
    DENSE_LEARNING_RATE,
    EMBEDDING_DIM,
    EMBEDDING_LEARNING_RATE,
    OVER_LAYERS,
    EpochClock,
    labels,
    parse_options,
    report,
)
from torch import Tensor

from recemb.allocator import tune_allocators
from recemb.assembly import ModelInputs
from recemb.budget import fit_to_budget, parse_budget
from recemb.checkpoint import Checkpoints
from recemb.collection import CompressedEmbeddingBagCollection
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.memory import full_table_bytes
from recemb.methods.full import Full
from recemb.methods.unified import Unified
from recemb.models.dlrm import DLRM
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from recemb.training.loop import LoopSettings, TrainingLoop
from recemb.training.metrics_log import MetricsLog
from recemb.training.progress import Progress
from recemb.training.schedule import LearningRateSchedule
from recemb.training.stopping import EarlyStopping

VARIANTS = [
    f"{method}-{rest}" for method in ("full", "unified") for rest in ("fp32", "fp32-compile", "bf16", "bf16-compile")
]


class ClockedCheckpoints(Checkpoints):
    """Writes nothing: the place after validation where the next epoch of training begins."""

    def __init__(self, clock: EpochClock) -> None:
        self._clock = clock

    def save(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any], *, best_step: int | None) -> Path:
        self._clock.start()
        return Path()


def build(options: Any, manifest: Manifest) -> DLRM:
    inputs = ModelInputs.of(manifest)
    tables = inputs.logical_tables(EMBEDDING_DIM)
    method = Full
    if options.variant.startswith("unified"):
        budget = parse_budget("10x", sum(full_table_bytes(tables).values()))
        method = fit_to_budget(tables, partial(Unified, num_lookups=2), budget)
    return DLRM(
        # As the entry point does: the loader has checked every id against the manifest.
        CompressedEmbeddingBagCollection(tables, method, check_ids=False),
        num_dense=len(inputs.numeric),
        bottom_layers=BOTTOM_LAYERS,
        over_layers=OVER_LAYERS,
    )


def main() -> None:
    options = parse_options(*VARIANTS)
    precision = "bf16" if "bf16" in options.variant else "fp32"
    manifest = Manifest.load(options.data)
    model, optimizer = prepare(
        build(options, manifest),
        EmbeddingOptimizer("rowwise_adagrad", learning_rate=EMBEDDING_LEARNING_RATE),
        partial(torch.optim.Adam, lr=DENSE_LEARNING_RATE, fused=True),
    )
    if "compile" in options.variant:
        model.head.compile()
    tune_allocators()
    train = ParquetLoader(manifest, "train", batch_size=options.batch_size, shuffle=True, seed=options.seed)
    clock = EpochClock()
    scores: list[Tensor] = []

    def validate() -> dict[str, float]:
        clock.stop(train.num_rows)
        if not scores:
            model.eval()
            loader = ParquetLoader(manifest, "validation", batch_size=options.batch_size)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                scores.append(torch.cat([model(batch.dense, batch.sparse).float() for batch in loader]))
        return {"auc": 0.5}

    total_steps = options.epochs * len(train)
    loop = TrainingLoop(
        model,
        optimizer,
        train,
        settings=LoopSettings(total_steps=total_steps, batch_size=options.batch_size, precision=precision),
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
    report(options, clock, labels(options.data, "validation"), scores[0].numpy())


if __name__ == "__main__":
    main()
