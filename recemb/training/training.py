"""One training in one folder: steps, validations, checkpoints and logs, from wherever the folder says it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from recemb.allocator import tune_allocators
from recemb.checkpoint import load_state
from recemb.config import TrainConfig, build_target
from recemb.data.parquet import ParquetLoader
from recemb.optimizers import TrainingOptimizer
from recemb.preparation import prepare
from recemb.ranks import Ranks
from recemb.run_folder import RunFolder
from recemb.training.bilevel import Steps
from recemb.training.loop import LoopSettings, SteppedOptimizer, TrainingLoop
from recemb.training.metrics_log import MetricsLog, NoLog
from recemb.training.precision import warn_where_bf16_is_slow
from recemb.training.progress import Progress
from recemb.training.schedule import LearningRateSchedule
from recemb.training.stopping import EarlyStopping


class Training:
    """A ``TrainingLoop`` as a config describes it.

    Args:
        config: of the run.
        folder: checkpoints, metrics.jsonl and TensorBoard's events go there.
        model: after ``recemb.prepare``.
        optimizer: likewise.
        loader: this rank's train batches, see ``batch_size_of``.
        train_rows: rows of an epoch, of all ranks.
        validate: metrics of the validation split with the model as it is, equal on every rank.
        device: where to train.
        ranks: processes of the run.
        description: see ``TrainingLoop``.
        steps: see ``TrainingLoop``.
        epochs: instead of ``trainer.epochs``.
        max_steps: instead of ``trainer.max_steps``.
        stops_early: False trains all steps, whatever ``trainer.stopping`` says; the best is known all the same.
        validate_start: the weights that it starts from may be the best.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        *,
        model: nn.Module,
        optimizer: SteppedOptimizer,
        loader: ParquetLoader,
        train_rows: int,
        validate: Callable[[], Mapping[str, float]],
        device: torch.device,
        ranks: Ranks,
        description: Mapping[str, Any],
        steps: Steps | None = None,
        epochs: int | None = None,
        max_steps: int | None = None,
        stops_early: bool = True,
        validate_start: bool = False,
    ) -> None:
        trainer, stopping = config.trainer, config.trainer.stopping
        self.folder = folder
        self._precision = trainer.precision
        self._device = device
        self._ranks = ranks
        epochs = trainer.epochs if epochs is None else epochs
        max_steps = trainer.max_steps if max_steps is None else max_steps
        total_steps = _total_steps(epochs, loader, folder)
        if max_steps is not None:
            total_steps = min(total_steps, max_steps)
        self._total_rows = min(total_steps * loader.batch_size * ranks.world_size, epochs * train_rows)
        self.stopping = EarlyStopping(
            metric=stopping.metric,
            patience=stopping.patience if stops_early else None,
            min_delta=stopping.min_delta,
        )
        self.loop = TrainingLoop(
            model,
            optimizer,
            loader,
            settings=LoopSettings(
                total_steps=total_steps,
                batch_size=loader.batch_size,
                precision=trainer.precision,
                log_every_steps=trainer.log_every_steps,
                validate_every_steps=trainer.steps_between_validations(len(loader)),
                checkpoint_every_steps=trainer.checkpoint_every_steps,
                validate_start=validate_start,
            ),
            schedule=LearningRateSchedule(
                total_steps=total_steps,
                warmup_steps=trainer.schedule.warmup_steps,
                decay=trainer.schedule.decay,
                decay_start_step=trainer.schedule.decay_start_step,
                final_factor=trainer.schedule.final_factor,
            ),
            stopping=self.stopping,
            validate=validate,
            checkpoints=folder.checkpoints,
            device=device,
            description=description,
            steps=steps,
        )

    def run(self) -> None:
        """Train to the end, from the last checkpoint where there is one."""
        loop = self.loop
        tune_allocators()
        if self._precision == "bf16":
            warn_where_bf16_is_slow(self._device)
        resumed_step = None
        if self.folder.checkpoints.last is not None:
            loop.resume()
            resumed_step = loop.step
        terminal = None if self._ranks.is_first else False
        with ExitStack() as stack:
            progress = stack.enter_context(Progress(self._total_rows, done_samples=loop.samples, terminal=terminal))
            if self._ranks.is_first:
                loop.run(stack.enter_context(MetricsLog(self.folder.path, resume_step=resumed_step)), progress)
            else:
                loop.run(NoLog(), progress)

    def figures(self) -> dict[str, Any]:
        """Steps, samples and seconds of the whole training, killed runs included."""
        loop = self.loop
        return {
            "samples": loop.samples,
            "samples_per_second": loop.samples / loop.seconds,
            "seconds": loop.seconds,
            "cpu_seconds": loop.cpu_seconds,
            "samples_per_cpu_second": loop.samples / loop.cpu_seconds,
            "steps": loop.step,
            "epochs": loop.epochs,
            "stopped_early": self.stopping.should_stop,
        }


def batch_size_of(config: TrainConfig, folder: RunFolder, ranks: Ranks) -> int:
    """Rows of one rank's batch: other ranks than those of the last checkpoint share the rows of its steps.

    Raises:
        ValueError: they cannot be shared equally.
    """
    last = folder.checkpoints.last
    if last is None:
        return config.trainer.batch_size
    loader = load_state(last)["loader"]
    rows = loader["batch_size"] * loader["world_size"]
    if rows % ranks.world_size:
        raise ValueError(
            f"{last}: a step takes {rows} rows, which {ranks.world_size} ranks cannot share equally; "
            f"it was trained by {loader['world_size']}"
        )
    return int(rows // ranks.world_size)


def _total_steps(epochs: int, loader: ParquetLoader, folder: RunFolder) -> int:
    """Steps of all epochs; those done before the last checkpoint may have been of another number of ranks."""
    done = 0
    if (last := folder.checkpoints.last) is not None:
        state = load_state(last)
        done = state["step"]
        loader.load_state_dict(state["loader"])
    return done + loader.batches_left + (epochs - 1 - loader.epoch) * len(loader)


def prepare_as(config: TrainConfig, model: nn.Module, device: torch.device) -> tuple[nn.Module, TrainingOptimizer]:
    """``recemb.prepare`` with the optimizers and the placement of a config; its dense layers compiled if it says so.

    Raises:
        ValueError: see ``recemb.prepare``; nothing to compile.
    """
    trainer = config.trainer
    prepared, optimizer = prepare(
        model,
        build_target(config.optimizer.embedding),
        build_target(config.optimizer.dense),
        device=device,
        placement=trainer.placement,
        caching=trainer.caching,
    )
    if trainer.compile:
        _compile_dense_part(prepared)
    return prepared, optimizer


def _compile_dense_part(model: nn.Module) -> None:
    # Sharded models hold theirs as ``module``.
    head = getattr(getattr(model, "module", model), "head", None)
    if not isinstance(head, nn.Module):
        raise ValueError(f"trainer.compile compiles model.head, and {type(model).__name__} has none; set it to false")
    head.compile()
