"""The step loop: batches in, a trained model and its best checkpoint out."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from recemb.checkpoint import Checkpoints, Optimizer, load_model_tensors, load_optimizer_tensors, load_state
from recemb.collection import compressed_groups
from recemb.data.batch import Batch
from recemb.evaluation.gather import gather_texts
from recemb.evaluation.predictions import Diverged
from recemb.ranks import is_first_rank, sum_over_ranks
from recemb.training.bilevel import SearchOptimizer, Steps, Together
from recemb.training.metrics_log import StepLog
from recemb.training.progress import Progress
from recemb.training.randomness import random_state, restore_random_state
from recemb.training.schedule import LearningRateSchedule
from recemb.training.stopping import EarlyStopping

logger = logging.getLogger(__name__)

_LOWER_RATES = (
    "Lower optimizer.embedding.learning_rate and optimizer.dense.lr, or raise trainer.schedule.warmup_steps; the last "
    "checkpoint is from before"
)


class Loader(Protocol):
    """What the loop needs of a loader: an epoch from the current position, and that position."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def batches_left(self) -> int: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class SteppedOptimizer(Optimizer, SearchOptimizer, Protocol):
    """What ``recemb.prepare`` returns: tables (updated inside backward) and dense layers as one."""

    def set_learning_rate_factor(self, factor: float) -> None: ...


@dataclass(frozen=True)
class LoopSettings:
    """How to step.

    Args:
        total_steps: steps of the whole training.
        batch_size: rows of a full batch of one rank, to name the rows of a bad one.
        precision: ``"fp32"``, or ``"bf16"``: autocast of the dense layers; tables, loss and optimizer stay fp32.
        log_every_steps: a line in metrics.jsonl and TensorBoard, and a look at the loss on CUDA.
        validate_every_steps: besides the end of every epoch; None: only there.
        checkpoint_every_steps: besides those of validations; None: only those.
        validate_start: before the first step too. For weights that were trained before, which may stay the best.
    """

    total_steps: int
    batch_size: int
    precision: str = "fp32"
    log_every_steps: int = 20
    validate_every_steps: int | None = None
    checkpoint_every_steps: int | None = None
    validate_start: bool = False


class TrainingLoop:
    """Trains ``model`` with ``optimizer`` on ``loader`` until the steps are done or validation stops improving.

    Args:
        model: called as ``model(dense, sparse) -> (B,) logits``.
        optimizer: what ``recemb.prepare`` returned.
        loader: train batches.
        settings: see ``LoopSettings``.
        schedule: factor of the learning rates.
        stopping: reads every validation.
        validate: metrics of the validation split with the model as it is.
        checkpoints: where checkpoints go.
        device: where batches go.
        description: stored as ``run`` in the state of every checkpoint, fit for JSON.
        steps: for searches, how weights and architecture take turns; everything together where None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SteppedOptimizer,
        loader: Loader,
        *,
        settings: LoopSettings,
        schedule: LearningRateSchedule,
        stopping: EarlyStopping,
        validate: Callable[[], Mapping[str, float]],
        checkpoints: Checkpoints,
        device: torch.device,
        description: Mapping[str, Any],
        steps: Steps | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loader = loader
        self.settings = settings
        self.schedule = schedule
        self.stopping = stopping
        self.validate = validate
        self.checkpoints = checkpoints
        self.device = device
        self.description = description
        self.steps = steps or Together()
        self.step = 0
        self.samples = 0
        # Of steps only, waiting for batches included: validation and checkpoints are no training.
        self.seconds = 0.0
        # Of all threads, the loader's included: a neighbour on the machine does not change it as it does ``seconds``.
        self.cpu_seconds = 0.0
        self._steps_per_epoch = len(loader)
        # Step at which the first epoch began; where other ranks took part, at which it would have to have begun for
        # the present epoch to end when it does.
        self._first_step = 0
        self._groups = compressed_groups(model)
        self._factor: float | None = None
        self._window: list[Tensor] = []
        self._window_samples = 0

    @property
    def finished(self) -> bool:
        return self.step >= self.settings.total_steps or self.stopping.should_stop

    @property
    def epochs(self) -> float:
        """Epochs done."""
        return (self.step - self._first_step) / self._steps_per_epoch

    def resume(self) -> None:
        """Go on from the last checkpoint, exactly: model, optimizer state, loader position, generators, stopping.

        Another number of ranks takes over the same model and optimizer state, and those rows of the epoch that had not
        been taken. Generators of ranks that were not there before are copies of those that were: methods may rely on
        ranks drawing equal numbers.
        """
        last = self.checkpoints.last
        if last is None:
            raise FileNotFoundError(f"{self.checkpoints.folder}: no checkpoint to resume from")
        state = load_state(last)
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.loader.load_state_dict(state["loader"])
        self.steps.load_state_dict(state.get("steps", {}))
        load_model_tensors(last, self.model)
        load_optimizer_tensors(last, self.optimizer)
        self.step, self.samples = state["step"], state["samples"]
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
        self.stopping.load_state_dict(state["stopping"])
        restore_random_state(state["random"][rank % len(state["random"])])
        self._first_step = self.step + self.loader.batches_left - (self.loader.epoch + 1) * self._steps_per_epoch
        if is_first_rank():
            self.checkpoints.repair_best(self.stopping.best_step)
        logger.info("resumed from %s: %d of %d steps done", last, self.step, self.settings.total_steps)

    def run(self, log: StepLog, progress: Progress) -> None:
        """Train to the end.

        Raises:
            Diverged: the loss or, at a validation, a logit is not finite; names step, rows and what to change.
            ValueError: the loss is not finite because a numeric column is not; names step and row.
            OSError: a checkpoint or log could not be written; the last checkpoint is whole.
        """
        if self.settings.validate_start and self.checkpoints.last is None:
            self._validate(log)
            self._save()
        self.model.train()
        self._start_clocks()
        while not self.finished:
            for batch in self.loader:
                self._train_step(batch.to(self.device))
                self._after_step(log, progress)
                if self.finished:
                    break

    def _train_step(self, batch: Batch) -> None:
        if (factor := self.schedule.factor(self.step)) != self._factor:
            self.optimizer.set_learning_rate_factor(factor)
            self._factor = factor
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            logits = self.model(batch.dense, batch.sparse)
        loss = binary_cross_entropy_with_logits(logits.float(), batch.labels)
        # Before backward(), which would write NaN into the tables. On CUDA looking stalls the device: there the
        # window is looked at when it is logged.
        if self.device.type == "cpu" and not math.isfinite(loss.item()):
            raise self._diagnose(self.step, loss.item(), batch)
        objective = loss
        for group in self._groups:
            if (penalty := group.penalty()) is not None:
                objective = objective + penalty
        objective.backward()
        self.steps.step(self.optimizer)
        self._window.append(loss.detach())
        self._window_samples += len(batch.labels)
        self.step += 1
        self.steps.after_step(self.step, self.model, self.optimizer)
        for group in self._groups:
            group.after_step(self.step)

    def _after_step(self, log: StepLog, progress: Progress) -> None:
        settings = self.settings
        validates = (
            self.step == settings.total_steps
            or (settings.validate_every_steps is not None and self.step % settings.validate_every_steps == 0)
            or self.loader.batches_left == 0
        )
        saves = validates or (
            settings.checkpoint_every_steps is not None and self.step % settings.checkpoint_every_steps == 0
        )
        # Before a checkpoint too: a resumed run starts with an empty window, as this one then does.
        if saves or self.step % settings.log_every_steps == 0:
            self._log(log, progress)
        if validates:
            self._validate(log)
            self.model.train()
        if saves:
            self._save()
        if saves or validates:
            self._start_clocks()

    def _validate(self, log: StepLog) -> None:
        try:
            metrics = self.validate()
        except Diverged as error:
            # The last step may have written what no loss has met yet.
            raise Diverged(f"validation after step {self.step}: {error}. {_LOWER_RATES}") from error
        best = all(group.settled for group in self._groups) and self.stopping.update(self.step, metrics)
        log.write(self.step, "validation", metrics)
        shown = ", ".join(_shown(name, value) for name, value in metrics.items())
        earlier = self.stopping.best_value
        so_far = " (best)" if best else "" if earlier is None else f" (best {earlier:.5f})"
        logger.info("step %d: validation %s%s", self.step, shown, so_far)

    def _start_clocks(self) -> None:
        self._clock, self._cpu_clock = time.perf_counter(), time.process_time()

    def _log(self, log: StepLog, progress: Progress) -> None:
        losses = torch.stack(self._window).tolist()
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise self._diagnose(self.step - len(losses) + index, loss, None)
        elapsed = time.perf_counter() - self._clock
        self.seconds += elapsed
        self.cpu_seconds += time.process_time() - self._cpu_clock
        self._start_clocks()
        # Of all ranks, whose batches count alike.
        loss, samples, ranks = sum_over_ranks([math.fsum(losses) / len(losses), self._window_samples, 1], self.device)
        loss /= ranks
        self.samples += int(samples)
        values = {
            "loss": loss,
            "learning_rate_factor": self._factor or 0.0,
            "samples_per_second": samples / elapsed,
            "epoch": self.epochs,
        }
        log.write(self.step, "train", values)
        progress.update(step=self.step, num_samples=int(samples), loss=loss)
        self._window.clear()
        self._window_samples = 0

    def _save(self) -> None:
        state = {
            "samples": self.samples,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "stopping": self.stopping.state_dict(),
            "loader": self.loader.state_dict(),
            "steps": self.steps.state_dict(),
            "random": [json.loads(text) for text in gather_texts(json.dumps(random_state()))],
            "run": self.description,
        }
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.checkpoints.save(self.step, tensors, state, best_step=self.stopping.best_step)

    def _diagnose(self, step: int, loss: float, batch: Batch | None) -> ValueError:
        epoch, index = divmod(step - self._first_step, self._steps_per_epoch)
        first = index * self.settings.batch_size
        rows = len(batch.labels) if batch is not None else self.settings.batch_size
        text = (
            f"loss is {loss} in step {step}, epoch {epoch}, rows {first} to {first + rows - 1} of the epoch's order: "
        )
        if batch is not None and not torch.isfinite(batch.dense).all():
            row, column = (~torch.isfinite(batch.dense)).nonzero()[0].tolist()
            return ValueError(
                f"{text}numeric column {column} of row {first + row} is {batch.dense[row, column].item()}"
            )
        return Diverged(f"{text}the model diverged. {_LOWER_RATES}")


def _shown(name: str, value: float) -> str:
    """Counts as they are, metrics to five digits."""
    return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.5f}"
