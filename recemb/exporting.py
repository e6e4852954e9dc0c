"""From a trained run to a folder that serves, with the proof that both predict the same.

``FOLDER/export.json`` says what was compared; the folder appears only where predictions agree.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from recemb.config import parse
from recemb.conversion import convert
from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.evaluation.job import DataPath, check_fits
from recemb.evaluation.metrics import auc, log_loss_from_logits
from recemb.evaluation.predictions import Predictions, collect
from recemb.files import write_json
from recemb.memory import measure_memory
from recemb.model_description import collections_of
from recemb.run_folder import load_model
from recemb.saved_model import load, save

logger = logging.getLogger(__name__)

RESULT_FILE = "export.json"


@dataclass(frozen=True)
class ExportConfig:
    """All of ``configs/export.yaml``, which says what each key means."""

    run: str
    output: str
    data: DataPath
    split: str
    max_rows: int | None
    batch_size: int
    device: str
    tolerance: float

    def __post_init__(self) -> None:
        for name in ("max_rows", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"export: {name} must be at least 1, got {value}")
        if self.tolerance < 0:
            raise ValueError(f"export: tolerance must be at least 0, got {self.tolerance}")


@dataclass(frozen=True)
class Export:
    """What was saved, and how it compares with the run.

    Args:
        folder: what ``recemb.load`` takes.
        split, rows: the rows compared.
        max_difference: largest difference of a logit.
        metrics: ``{"auc": {"trained": ..., "exported": ...}, "logloss": ...}``.
        trained_bytes, serving_bytes, full_bytes: of the tables: as they trained, as they serve, uncompressed.
        files: name -> bytes.
    """

    folder: Path
    split: str
    rows: int
    max_difference: float
    metrics: Mapping[str, Mapping[str, float]]
    trained_bytes: int
    serving_bytes: int
    full_bytes: int
    files: Mapping[str, int]

    def table(self) -> str:
        """For people."""
        ratio = f", {self.full_bytes / self.serving_bytes:.2f}x smaller than full tables" if self.full_bytes else ""
        lines = [
            f"{self.folder}: the same predictions on {self.rows:,} rows of {self.split}, "
            f"largest difference of a logit {self.max_difference:.3g}",
            *(
                f"{name:<8} {values['trained']:.6f} trained  {values['exported']:.6f} exported"
                for name, values in self.metrics.items()
            ),
            f"tables   {self.serving_bytes:,} bytes{ratio}; {self.trained_bytes:,} as they trained",
            *(f"{size:>15,} bytes  {name}" for name, size in self.files.items()),
        ]
        return "\n".join(lines)


def export(config: Mapping[str, Any]) -> Export:
    """Convert, save, load again, and compare the predictions with those of the checkpoint.

    Args:
        config: ``configs/export.yaml`` as a plain dict, resolved.

    Raises:
        FileExistsError: something lies at ``output``.
        ValueError, FileNotFoundError: the config, the run or the data; or predictions that differ. Nothing is left at
            ``output`` then.
    """
    settings = parse(ExportConfig, config)
    output = Path(settings.output)
    if output.exists():
        raise FileExistsError(f"{output}: export needs a new folder, something lies there; give output=FOLDER")
    start = time.perf_counter()
    device = torch.device(settings.device)
    model, run_config = load_model(settings.run, device)
    root = settings.data.path or run_config.data.path
    if root is None:
        raise ValueError(f"{settings.run}: the run does not say which data set it was trained on; give data=DIR")
    manifest = Manifest.load(root)
    manifest.verify_split(settings.split)
    check_fits(model, manifest, Path(settings.run))
    trained, trained_bytes = _predict(model, manifest, settings), _memory(model)["trained_bytes"]
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        save(convert(model), partial, manifest=manifest)
        # As far as memory goes, before the model comes a second time.
        del model
        served = load(partial, device)
        exported = _predict(served, manifest, settings)
        memory = _memory(served)
        result = Export(
            folder=output,
            split=settings.split,
            rows=len(trained.labels),
            max_difference=_largest_difference(trained, exported, settings),
            metrics=_metrics(trained, exported),
            trained_bytes=trained_bytes,
            serving_bytes=memory["serving_bytes"],
            full_bytes=memory["full_bytes"],
            files={path.name: path.stat().st_size for path in sorted(partial.iterdir())},
        )
        content = {
            **asdict(result),
            "folder": str(output),
            "settings": asdict(settings),
            "data": str(root),
            "memory": memory,
            "seconds": time.perf_counter() - start,
        }
        write_json(partial / RESULT_FILE, content)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def _predict(model: nn.Module, manifest: Manifest, settings: ExportConfig) -> Predictions:
    loader = ParquetLoader(manifest, settings.split, batch_size=settings.batch_size)
    num_batches = len(loader)
    if settings.max_rows is not None:
        num_batches = min(num_batches, -(-settings.max_rows // settings.batch_size))
    with tqdm(total=num_batches, unit=" batches", disable=None) as bar:
        return collect(
            model, itertools.islice(loader, num_batches), device=settings.device, on_batch=lambda rows: bar.update()
        )


def _largest_difference(trained: Predictions, exported: Predictions, settings: ExportConfig) -> float:
    differences = np.abs(trained.scores.astype(np.float64) - exported.scores.astype(np.float64))
    largest = float(differences.max())
    if largest > settings.tolerance:
        raise ValueError(
            f"{settings.run}: the exported model must give the logits of the trained one within {settings.tolerance}; "
            f"row {int(differences.argmax())} of {settings.split} differs by {largest:.3g}, and "
            f"{int((differences > settings.tolerance).sum())} of {len(differences)} rows differ by more"
        )
    return largest


def _metrics(trained: Predictions, exported: Predictions) -> dict[str, dict[str, float]]:
    both = {"trained": trained, "exported": exported}
    return {
        "auc": {name: auc(item.labels, item.scores) for name, item in both.items()},
        "logloss": {name: log_loss_from_logits(item.labels, item.scores) for name, item in both.items()},
    }


def _memory(model: nn.Module) -> dict[str, Any]:
    """The report of the one collection that run models have."""
    [report] = [measure_memory(collection) for collection in collections_of(model).values()]
    return report.to_dict()
