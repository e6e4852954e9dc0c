"""One evaluation from end to end: a saved model or a Parquet file in, ``evaluation.json`` and plots out.

``evaluation.json`` is written last: a folder without it is an evaluation that did not finish.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from recemb.config import parse
from recemb.data.label_classes import check_both_labels
from recemb.data.manifest import FILE_NAME, TRUE_PROBABILITY, Manifest, checksum
from recemb.evaluation.checks import check_both_classes
from recemb.evaluation.evaluator import Evaluation, evaluate_predictions
from recemb.evaluation.plots import reliability_plot, slice_plot
from recemb.evaluation.predictions import Predictions, collect, read_predictions, write_predictions
from recemb.files import write_json

logger = logging.getLogger(__name__)

RESULT_NAME = "evaluation.json"
# Its presence tells the folder of a run from a single checkpoint.
CONFIG_FILE = "config.yaml"
# Rows: large enough to keep a GPU busy, small enough that a batch's activations are some ten megabytes.
DEFAULT_BATCH_SIZE = 16_384

ModelLoader = Callable[[Path, torch.device], tuple[Callable[..., torch.Tensor], Any]]


@dataclass(frozen=True)
class DataPath:
    """Folder of an encoded data set."""

    path: str | None


@dataclass(frozen=True)
class EvaluateConfig:
    """All of ``configs/evaluate.yaml``, which says what each key means.

    Raises:
        ValueError: not exactly one of checkpoint and predictions; a key that the one given does not use; a value out of
            range.
    """

    checkpoint: str | None
    data: DataPath
    split: str | None
    batch_size: int | None
    device: str
    predictions: str | None
    label_column: str | None
    score_column: str | None
    score_kind: str | None
    user_column: str | None
    slices: list[str]
    max_slices: int
    bootstrap: int
    confidence: float
    seed: int
    num_bins: int
    baseline_auc: float | None
    output: str | None
    write_predictions: bool

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.predictions is None):
            raise ValueError(
                "evaluate: give either checkpoint=RUN_FOLDER (a saved model) or predictions=FILE.parquet, "
                f"got checkpoint={self.checkpoint} and predictions={self.predictions}"
            )
        only_predictions = ("label_column", "score_column", "score_kind")
        ignored: Sequence[str] = [name for name in only_predictions if getattr(self, name) is not None]
        given, other = "checkpoint", "predictions"
        if self.predictions is not None:
            given, other = other, given
            for_models = {"data.path": self.data.path, "split": self.split, "batch_size": self.batch_size}
            ignored = [name for name, value in for_models.items() if value is not None]
            ignored += ["write_predictions"] if self.write_predictions else []
            if self.label_column is None or self.score_column is None:
                raise ValueError("evaluate: predictions=... needs label=COLUMN and score=COLUMN")
        if ignored:
            raise ValueError(f"evaluate: {ignored[0]} is for {other}=..., nothing reads it with {given}=...")
        if self.score_kind not in (None, "probability", "logit"):
            raise ValueError(f"evaluate: score_kind must be probability or logit, got {self.score_kind!r}")
        for name, least in (("batch_size", 1), ("bootstrap", 0), ("max_slices", 1), ("num_bins", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"evaluate: {name} must be at least {least}, got {value}")
        if not 0 < self.confidence < 1 or self.bootstrap == 1:
            raise ValueError(
                "evaluate: confidence must be in (0, 1) and bootstrap 0 or at least 2, "
                f"got {self.confidence} and {self.bootstrap}"
            )
        if self.baseline_auc is not None and not 0.5 < self.baseline_auc <= 1:
            raise ValueError(f"evaluate: baseline_auc must be in (0.5, 1], got {self.baseline_auc}")


@dataclass(frozen=True)
class Outcome:
    """The metrics, and the folder in which ``evaluation.json`` and the plots lie."""

    evaluation: Evaluation
    folder: Path


@dataclass(frozen=True)
class _Source:
    """Predictions, and what is said about them in results and plots."""

    predictions: Predictions
    user_column: str | None
    label: str
    title: str
    description: Mapping[str, Any]


def run(config: Mapping[str, Any], load_model: ModelLoader) -> Outcome:
    """Evaluate what the config says and write the results.

    Args:
        config: ``configs/evaluate.yaml`` as a plain dict, resolved.
        load_model: (path of a run folder or checkpoint, device) -> (model, config of its run).

    Raises:
        ValueError, FileNotFoundError: the config, the model, the data or the predictions; nothing is written then.
    """
    settings = parse(EvaluateConfig, config)
    folder = _output_folder(settings)
    _check_writable(folder)
    start = time.perf_counter()
    source = _from_file(settings) if settings.predictions is not None else _from_model(settings, load_model)
    middle = time.perf_counter()
    evaluation = evaluate_predictions(
        source.predictions,
        user_column=source.user_column,
        slice_columns=settings.slices,
        max_slices=settings.max_slices,
        num_bins=settings.num_bins,
        replicates=settings.bootstrap,
        confidence=settings.confidence,
        seed=settings.seed,
        baseline_auc=settings.baseline_auc,
    )
    seconds = {"predictions": middle - start, "metrics": time.perf_counter() - middle}

    folder.mkdir(parents=True, exist_ok=True)
    # An older result must not stand beside newer plots if this is interrupted.
    (folder / RESULT_NAME).unlink(missing_ok=True)
    if settings.write_predictions:
        write_predictions(source.predictions, folder / "predictions.parquet", label=source.label)
    reliability_plot(evaluation, folder / "reliability.png", title=f"Reliability: {source.title}")
    for column in settings.slices:
        # A column's name may hold what a file's name must not.
        name = re.sub(r"[^\w.-]+", "_", column)
        slice_plot(evaluation, column, folder / f"slices_{name}.png", title=f"AUC by {column}: {source.title}")
    content = {"source": source.description, "settings": asdict(settings), "seconds": seconds, **evaluation.to_dict()}
    write_json(folder / RESULT_NAME, content)
    return Outcome(evaluation, folder)


def _from_file(settings: EvaluateConfig) -> _Source:
    assert settings.predictions is not None and settings.label_column is not None and settings.score_column is not None
    path = Path(settings.predictions)
    users = [] if settings.user_column is None else [settings.user_column]
    predictions = read_predictions(
        path,
        label=settings.label_column,
        score=settings.score_column,
        are_logits=settings.score_kind == "logit",
        columns=[*users, *settings.slices],
    )
    check_both_classes(predictions.labels, f"{path}, column {settings.label_column!r}")
    return _Source(
        predictions,
        settings.user_column,
        settings.label_column,
        path.name,
        {"predictions": str(path), "predictions_checksum": checksum(path)},
    )


def _from_model(settings: EvaluateConfig, load_model: ModelLoader) -> _Source:
    # Here, because it imports TorchRec: seconds that metrics of a Parquet file need not wait.
    from recemb.data.parquet import ParquetLoader

    assert settings.checkpoint is not None
    path, split = Path(settings.checkpoint), settings.split or "test"
    device = _device(settings.device)
    model, run_config = load_model(path, device)
    root = settings.data.path or run_config.data.path
    if root is None:
        raise ValueError(f"{path}: the run does not say which data set it was trained on; give data=DIR")
    manifest = Manifest.load(root)
    manifest.verify()
    check_both_labels(manifest, split)
    check_fits(model, manifest, path)
    user_column = settings.user_column or manifest.user
    extra = _extra_columns(manifest, split, user_column, settings.slices)
    loader = ParquetLoader(manifest, split, batch_size=settings.batch_size or DEFAULT_BATCH_SIZE, extra_columns=extra)
    logger.info("evaluating %s on split %s of %s (%s rows), %s", path, split, root, f"{loader.num_rows:,}", device)
    with tqdm(total=loader.num_rows, unit=" rows", unit_scale=True, disable=None) as bar:
        predictions = collect(model, loader, device=device, on_batch=bar.update)
    description = {
        "checkpoint": str(path),
        "data": str(root),
        "data_source": manifest.source,
        "manifest_checksum": checksum(Path(root) / FILE_NAME),
        "split": split,
    }
    return _Source(predictions, user_column, manifest.label, f"{Path(root).name}, {split} split", description)


def check_fits(model: Callable[..., torch.Tensor], manifest: Manifest, checkpoint: Path) -> None:
    """Features and numbers of ids must be the model's: an id of another vocabulary looks up a stranger's row."""
    from recemb.method import UNBOUNDED

    embeddings = getattr(model, "embeddings", None)
    # Pooled collections have the one, unpooled ones the other.
    names = ("embedding_bag_configs", "embedding_configs")
    configs = next((getattr(embeddings, name) for name in names if hasattr(embeddings, name)), None)
    if configs is None:
        raise ValueError(
            f"{checkpoint}: a model with `embeddings.embedding_bag_configs()` or `embedding_configs()` is required, "
            f"got {type(model)}"
        )
    expected = {feature: table.num_embeddings for table in configs() for feature in table.feature_names}
    found = {
        feature.name: UNBOUNDED if feature.num_embeddings is None else feature.num_embeddings
        for feature in manifest.categorical
    }
    for feature in [*expected, *found]:
        if expected.get(feature) != found.get(feature):
            raise ValueError(
                f"{manifest.root / FILE_NAME}: feature {feature!r} has {found.get(feature, 'no')} ids, the model of "
                f"{checkpoint} was trained with {expected.get(feature, 'no')}; evaluate on a data set that was encoded "
                "with the vocabulary of the training data"
            )


def _extra_columns(manifest: Manifest, split: str, user: str | None, slices: Sequence[str]) -> list[str]:
    """User, slices and, where the files have it, the probability that labels were drawn from."""
    wanted = [*([] if user is None else [user]), *slices]
    files = manifest.files(split)
    if files and TRUE_PROBABILITY in pq.read_schema(files[0]).names:
        wanted.append(TRUE_PROBABILITY)
    return list(dict.fromkeys(wanted))


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _output_folder(settings: EvaluateConfig) -> Path:
    """Inside the run folder; beside a checkpoint that lies elsewhere, or a file of predictions."""
    if settings.output is not None:
        return Path(settings.output)
    if settings.predictions is not None:
        path = Path(settings.predictions)
        return path.with_name(f"{path.stem}_evaluation")
    path, split = Path(settings.checkpoint or ""), settings.split or "test"
    if (path / CONFIG_FILE).is_file():
        return path / f"evaluation_{split}"
    # RUN/checkpoints/NAME: not among the checkpoints, which training tidies up.
    run = path.absolute().parent.parent
    beside = path.with_name(f"{path.name}_evaluation_{split}")
    return run / f"evaluation_{path.name}_{split}" if (run / CONFIG_FILE).is_file() else beside


def _check_writable(folder: Path) -> None:
    """Before the work, not after it."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder}: results need a folder, {existing} is a file; give output=FOLDER")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: no permission to write into {existing}; give output=FOLDER")
