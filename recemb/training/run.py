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

from recemb.assembly import ModelInputs, build_model, decay_by_train_counts
from recemb.checkpoint import Checkpoints, load_model_tensors, load_state
from recemb.config import TrainConfig, build_target
from recemb.data.checks import check_split
from recemb.data.label_classes import check_both_labels
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.data_source import open_data_set
from recemb.evaluation.evaluator import evaluate_predictions
from recemb.evaluation.predictions import Predictions, collect
from recemb.files import write_json
from recemb.ranks import ALONE, Ranks
from recemb.run_folder import RESULTS_FILE, RunFolder
from recemb.training.randomness import seed_everything
from recemb.training.report import write_report
from recemb.training.results import common_results, dense_parameters
from recemb.training.run_stages import StagedRun, initial_checkpoints
from recemb.training.training import Training, batch_size_of, prepare_as
from recemb.training.validation import EVALUATION_BATCH_SIZE, validation_figures

logger = logging.getLogger(__name__)


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
        self.config = config
        self.folder = folder = RunFolder(Path(config.paths.run))
        self.device = device
        self.ranks = ranks
        self.data = _open(config, folder, ranks)
        # After the data, whose preparation may draw numbers of its own or, when it is there already, none.
        seed_everything(config.seed)
        inputs = ModelInputs.of(self.data.manifest)
        embedding_optimizer = build_target(config.optimizer.embedding)
        model, self.memory = build_model(
            config.embedding,
            config.model,
            inputs,
            embedding_optimizer,
            counted_by=self.data.manifest,
            # An optimizer of all rows keeps tables whole on every rank.
            spread=ranks.world_size > 1 and not embedding_optimizer.trains_all_rows,
        )
        if config.embedding.mini_batch_aware_decay:
            decay_by_train_counts(model, self.data.manifest, config.embedding.mini_batch_aware_decay)
        self.dense_parameters = dense_parameters(model)
        self.model, optimizer = prepare_as(config, model, device)
        self.training = Training(
            config,
            folder,
            model=self.model,
            optimizer=optimizer,
            loader=self.data.train,
            train_rows=self.data.manifest.split("train").rows,
            validate=self._validate,
            device=self.device,
            ranks=ranks,
            # Makes every checkpoint complete: a model can be built from it alone.
            description={
                "config": dict(content),
                "inputs": inputs.to_dict(),
                "data": str(self.data.manifest.root.resolve()),
            },
        )
        self.stopping = self.training.stopping

    def to_the_end(self, *, test: bool) -> dict[str, Any]:
        """Train; if ``test``, restore the best checkpoint, look at the test split once and write everything."""
        logger.info(
            "training on %s (%s rows), %s: %s bytes of tables%s",
            self.data.manifest.root,
            f"{self.data.manifest.split('train').rows:,}",
            self.config.embedding.method_name,
            f"{self.memory.serving_bytes:,}",
            f" instead of {self.memory.full_bytes:,}" if self.memory.full_bytes else ", whose ids are hashes",
        )
        self.training.run()
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
        return validation_figures(
            self._predict(self.data.validation), user=self.data.manifest.user, stops_by=self.stopping.metric
        )

    def _results(self) -> dict[str, Any]:
        """All but the metrics of the test split."""
        training = self.training.figures()
        # ``samples_per_cpu_second`` says it.
        del training["cpu_seconds"]
        return {
            **common_results(
                self.config,
                self.folder.path,
                self.memory,
                self.data.manifest,
                training_bytes=self.memory.training_bytes,
            ),
            "validation": {
                "best_step": self.stopping.best_step,
                self.stopping.metric: self.stopping.best_value,
                "rows": self.data.manifest.split("validation").rows,
            },
            "train": {
                **training,
                "device": str(self.device),
                "precision": self.config.trainer.precision,
                "dense_parameters": self.dense_parameters,
                "ranks": self.ranks.world_size,
            },
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
        if name != "train":
            # The metrics would, after the whole training.
            check_both_labels(manifest, name)
    return manifest


def _open(config: TrainConfig, folder: RunFolder, ranks: Ranks) -> _Data:
    manifest = _open_manifest(config, folder.checkpoints, ranks)
    batch_size = batch_size_of(config, folder, ranks)
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
