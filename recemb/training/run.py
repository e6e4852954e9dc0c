"""One run from end to end: data, model, training, the one look at the test split, results."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recemb.allocator import tune_allocators
from recemb.assembly import ModelInputs, build_model, decay_by_train_counts
from recemb.checkpoint import Checkpoints, load_model_tensors, load_state
from recemb.config import TrainConfig, build_target
from recemb.data.checks import check_split
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.data_source import open_data_set
from recemb.evaluation import metrics
from recemb.evaluation.evaluator import evaluate_predictions
from recemb.evaluation.grouped import grouped_auc
from recemb.evaluation.predictions import Predictions, collect
from recemb.files import write_json
from recemb.preparation import prepare
from recemb.ranks import ALONE, Ranks
from recemb.run_folder import RESULTS_FILE, RunFolder, git_state
from recemb.training.loop import LoopSettings, TrainingLoop
from recemb.training.metrics_log import MetricsLog, NoLog
from recemb.training.precision import warn_where_bf16_is_slow
from recemb.training.progress import Progress
from recemb.training.randomness import seed_everything
from recemb.training.report import write_report
from recemb.training.run_stages import StagedRun, initial_checkpoints
from recemb.training.schedule import LearningRateSchedule
from recemb.training.stopping import EarlyStopping

logger = logging.getLogger(__name__)

# Rows: large enough to keep a GPU busy, small enough that a batch's activations are some ten megabytes.
EVALUATION_BATCH_SIZE = 16_384


@dataclass(frozen=True)
class _Data:
    """The data set and a loader of each split, opened before anything is trained: a broken file is found at once."""

    manifest: Manifest
    train: ParquetLoader
    validation: ParquetLoader
    test: ParquetLoader


def train(
    content: Mapping[str, Any], *, continues: bool = False, ranks: Ranks = ALONE, test: bool = True
) -> dict[str, Any]:
    """Train, evaluate and report into ``paths.run``.

    Args:
        content: ``configs/train.yaml`` as a plain dict, resolved.
        continues: go on with the run in ``paths.run``, whose config this is.
        ranks: of this run, see ``recemb.ranks.joined_ranks``; the first rank's ``content`` counts. With several,
            ``trainer.batch_size`` is that of each.
        test: look at the test split at the end; a trial that chooses settings must not.

    Returns:
        What results.json holds.

    Raises:
        ValueError, OSError: bad config, data, budget; NaN loss; full disk. See the parts.
    """
    with ExitStack() as stack:
        results = _begin(content, continues, stack) if ranks.is_first else None
        content, results = ranks.share("run", (dict(content), results))
        if results is not None:
            return results
        config = TrainConfig.parse(content)
        if ranks.world_size == 1 and (config.trainer.placement or config.trainer.caching):
            raise ValueError("trainer.placement and trainer.caching are for several ranks (torchrun), got one process")
        device = ranks.device(_device(config.trainer.device))
        if config.trainer.caching and device.type != "cuda":
            raise ValueError(f"trainer.caching is for CUDA, whose memory is the cache, got trainer.device={device}")
        stack.enter_context(ranks.process_group(device))
        if config.trainer.threads is not None:
            torch.set_num_threads(config.trainer.threads)
        if config.embedding.stages:
            initial = initial_checkpoints(Path(config.paths.run))
            manifest = _open_manifest(config, initial, ranks)
            return StagedRun(config, content, device, ranks, manifest).to_the_end(test=test)
        return _Run(config, content, device, ranks).to_the_end(test=test)


def _begin(content: Mapping[str, Any], continues: bool, stack: ExitStack) -> dict[str, Any] | None:
    """Begin the run's folder and keep it locked as long as ``stack``; its results if it is finished already."""
    folder = RunFolder(Path(TrainConfig.parse(content).paths.run))
    stack.enter_context(folder.locked())
    if not continues:
        folder.begin(content)
    elif (results := folder.results()) is not None and content.get("stage") is None:
        logger.info("%s: the run is finished", folder.path)
        return results
    return None


class _Run:
    """The parts of a run, in the order they are made."""

    def __init__(self, config: TrainConfig, content: Mapping[str, Any], device: torch.device, ranks: Ranks) -> None:
        trainer = config.trainer
        self.config = config
        self.folder = folder = RunFolder(Path(config.paths.run))
        self.device = device
        self.ranks = ranks
        self.data = _open(config, folder, ranks)
        # After the data, whose preparation may draw numbers of its own or, when it is there already, none.
        seed_everything(config.seed)
        inputs = ModelInputs.of(self.data.manifest)
        embedding_optimizer = build_target(config.optimizer.embedding)
        model, self.memory = build_model(config.embedding, config.model, inputs, embedding_optimizer)
        if config.embedding.mini_batch_aware_decay:
            decay_by_train_counts(model, self.data.manifest, config.embedding.mini_batch_aware_decay)
        self.dense_parameters = _dense_parameters(model)
        self.model, optimizer = prepare(
            model,
            embedding_optimizer,
            build_target(config.optimizer.dense),
            device=self.device,
            placement=trainer.placement,
            caching=trainer.caching,
        )
        if trainer.compile:
            _compile_dense_part(self.model)
        total_steps = _total_steps(trainer.epochs, self.data.train, folder)
        if trainer.max_steps is not None:
            total_steps = min(total_steps, trainer.max_steps)
        self.stopping = EarlyStopping(
            metric=trainer.stopping.metric, patience=trainer.stopping.patience, min_delta=trainer.stopping.min_delta
        )
        self.loop = TrainingLoop(
            self.model,
            optimizer,
            self.data.train,
            settings=LoopSettings(
                total_steps=total_steps,
                batch_size=self.data.train.batch_size,
                precision=trainer.precision,
                log_every_steps=trainer.log_every_steps,
                validate_every_steps=trainer.steps_between_validations(len(self.data.train)),
                checkpoint_every_steps=trainer.checkpoint_every_steps,
            ),
            schedule=LearningRateSchedule(
                total_steps=total_steps,
                warmup_steps=trainer.schedule.warmup_steps,
                decay=trainer.schedule.decay,
                decay_start_step=trainer.schedule.decay_start_step,
                final_factor=trainer.schedule.final_factor,
            ),
            stopping=self.stopping,
            validate=self._validate,
            checkpoints=folder.checkpoints,
            device=self.device,
            # Makes every checkpoint complete: a model can be built from it alone.
            description={
                "config": dict(content),
                "inputs": inputs.to_dict(),
                "data": str(self.data.manifest.root.resolve()),
            },
        )

    def to_the_end(self, *, test: bool) -> dict[str, Any]:
        """Train; if ``test``, restore the best checkpoint, look at the test split once and write everything."""
        logger.info(
            "training on %s (%s rows), %s: %s bytes of tables instead of %s",
            self.data.manifest.root,
            f"{self.data.manifest.split('train').rows:,}",
            self.config.embedding.method_name,
            f"{self.memory.serving_bytes:,}",
            f"{self.memory.full_bytes:,}",
        )
        loop = self.loop
        tune_allocators()
        if self.config.trainer.precision == "bf16":
            warn_where_bf16_is_slow(self.device)
        if self.folder.checkpoints.last is not None:
            loop.resume()
        rows_per_step = self.data.train.batch_size * self.ranks.world_size
        rows = self.config.trainer.epochs * self.data.manifest.split("train").rows
        total = min(loop.settings.total_steps * rows_per_step, rows)
        terminal = None if self.ranks.is_first else False
        with ExitStack() as stack:
            progress = stack.enter_context(Progress(total, done_samples=loop.samples, terminal=terminal))
            if self.ranks.is_first:
                loop.run(stack.enter_context(MetricsLog(self.folder.path, resume_step=loop.step)), progress)
            else:
                loop.run(NoLog(), progress)
        if not test:
            return self._results()
        best = self.folder.checkpoints.best
        assert best is not None, "every training ends with a validation"
        load_model_tensors(best, self.model)
        users = self.data.manifest.user
        predictions = self._predict(self.data.test)
        results: dict[str, Any] = {}
        if self.ranks.is_first:
            evaluation = evaluate_predictions(predictions, user_column=users)
            results = {**self._results(), "test": evaluation.to_dict()}
            # In reliability.png; here it would hide the figures among 200 lines of bins.
            del results["test"]["reliability"]
            write_json(self.folder.path / "memory.json", self.memory.to_dict())
            write_report(self.folder.path, results, evaluation, self.memory)
            write_json(self.folder.path / RESULTS_FILE, results)
        return self.ranks.share("results", results)

    def _predict(self, loader: ParquetLoader) -> Predictions:
        """Predictions of all ranks on every rank."""
        return collect(self.model, loader, device=self.device, in_lockstep=self.ranks.world_size > 1)

    def _validate(self) -> dict[str, float]:
        predictions = self._predict(self.data.validation)
        # The same rows in the same order on every rank, so the same figures: all decide alike about stopping.
        figures = {
            "auc": metrics.auc(predictions.labels, predictions.scores),
            "logloss": metrics.mean(predictions.losses()),
        }
        if (user := self.data.manifest.user) is not None:
            users = grouped_auc(predictions.labels, predictions.scores, predictions.columns[user])
            # Undefined where every user has one class only, which matters to whoever stops by it.
            if users.num_left_out < users.num_groups or self.stopping.metric == "gauc":
                figures["gauc"] = users.mean()
        return figures

    def _results(self) -> dict[str, Any]:
        """All but the metrics of the test split."""
        manifest, loop = self.data.manifest, self.loop
        return {
            "task_name": self.config.task_name,
            "seed": self.config.seed,
            "run": str(self.folder.path),
            "validation": {
                "best_step": self.stopping.best_step,
                self.stopping.metric: self.stopping.best_value,
                "rows": self.data.manifest.split("validation").rows,
            },
            "embedding": {
                "method": self.config.embedding.method_name,
                "options": {key: value for key, value in self.config.embedding.method.items() if key[0] != "_"},
                "dim": self.config.embedding.embedding_dim,
                "budget": self.config.embedding.budget,
                "bytes": self.memory.serving_bytes,
                "full_bytes": self.memory.full_bytes,
                "ratio": self.memory.ratio,
                "table_bytes": self.memory.table_bytes,
                "index_bytes": self.memory.index_bytes,
                "dense_bytes": self.memory.dense_bytes,
                "optimizer_bytes": self.memory.optimizer_bytes,
            },
            "train": {
                "samples": loop.samples,
                "samples_per_second": loop.samples / loop.seconds,
                "seconds": loop.seconds,
                "samples_per_cpu_second": loop.samples / loop.cpu_seconds,
                "steps": loop.step,
                "epochs": loop.epochs,
                "stopped_early": self.stopping.should_stop,
                "device": str(self.device),
                "precision": self.config.trainer.precision,
                "dense_parameters": self.dense_parameters,
                "ranks": self.ranks.world_size,
            },
            "data": _data_results(manifest),
            "git": git_state(),
        }


def _open_manifest(config: TrainConfig, checkpoints: Checkpoints, ranks: Ranks) -> Manifest:
    """The data set of a run, checked; that of its checkpoints where it has any."""
    if (started_on := _started_on(checkpoints)) is None:
        # A synthetic log is made by one rank and found by the others.
        manifest = ranks.first_then_others("data", lambda: open_data_set(config.data))
    else:
        # Not data.path: what lies there now need not be what the run started on.
        manifest = Manifest.load(started_on)
        manifest.verify(checksums=config.data.verify_checksums)
    for name in ("validation", "test"):
        if manifest.split(name).rows == 0:
            raise ValueError(f"{manifest.root}: split {name!r} has no rows; early stopping and results need both")
    if config.trainer.stopping.metric == "gauc" and manifest.user is None:
        raise ValueError(f"trainer.stopping.metric=gauc: {manifest.root} has no user column; use auc or logloss")
    for name in ("train", "validation", "test"):
        # The loader would find a bad id too, but in the last file, hours later.
        check_split(manifest, name)
    return manifest


def _open(config: TrainConfig, folder: RunFolder, ranks: Ranks) -> _Data:
    manifest = _open_manifest(config, folder.checkpoints, ranks)
    batch_size = _batch_size(config, folder, ranks)
    extra = [manifest.user] if manifest.user is not None else []
    loader = functools.partial(ParquetLoader, manifest, rank=ranks.rank, world_size=ranks.world_size)
    return _Data(
        manifest,
        loader(
            "train",
            batch_size=batch_size,
            shuffle=config.data.shuffle,
            seed=config.seed,
        ),
        loader("validation", batch_size=EVALUATION_BATCH_SIZE, extra_columns=extra),
        loader("test", batch_size=EVALUATION_BATCH_SIZE, extra_columns=extra),
    )


def _started_on(checkpoints: Checkpoints) -> str | None:
    """Data set of the run being continued, None for one that has no checkpoint."""
    last = checkpoints.last
    return None if last is None else str(load_state(last)["run"]["data"])


def _batch_size(config: TrainConfig, folder: RunFolder, ranks: Ranks) -> int:
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


def _data_results(manifest: Manifest) -> dict[str, Any]:
    content: dict[str, Any] = {
        "source": manifest.source,
        "path": str(manifest.root.resolve()),
        "rows": {name: split.rows for name, split in manifest.splits.items()},
        "numeric_features": len(manifest.numeric),
        "categorical_features": len(manifest.categorical),
    }
    if manifest.optimum is not None:
        content["optimum"] = dict(manifest.optimum)
    return content


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"trainer.device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"trainer.device={name}: this torch sees no CUDA device; use trainer.device=auto or cpu")
    return device


def _compile_dense_part(model: nn.Module) -> None:
    # Sharded models hold theirs as ``module``.
    head = getattr(getattr(model, "module", model), "head", None)
    if not isinstance(head, nn.Module):
        raise ValueError(f"trainer.compile compiles model.head, and {type(model).__name__} has none; set it to false")
    head.compile()


def _dense_parameters(model: nn.Module) -> int:
    """Numbers trained outside the tables and their methods."""
    embeddings = {id(parameter) for parameter in getattr(model, "embeddings", nn.Module()).parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in embeddings)
