"""What every contender of the speed study has in common: options, one thread, an epoch clock, one JSON line.

Runs in the peers' virtual environments too, so it needs nothing but the standard library, numpy, pyarrow and torch.
A contender builds its model, then for each epoch trains between ``clock.start()`` and ``clock.stop(rows)`` and scores
the validation rows after the first one; ``report`` prints the result as the last line of standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

NUM_NUMERIC = 13
NUM_CATEGORICAL = 26
NUMERIC = [f"I{i + 1}" for i in range(NUM_NUMERIC)]
CATEGORICAL = [f"C{i + 1}" for i in range(NUM_CATEGORICAL)]
EMBEDDING_DIM = 16
BOTTOM_LAYERS = [128, 64, 16]
OVER_LAYERS = [256, 128, 1]
DENSE_LEARNING_RATE = 1e-3
EMBEDDING_LEARNING_RATE = 0.05


@dataclass
class EpochClock:
    """Wall-clock and CPU seconds of each epoch of training; scoring and set-up stay outside."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    _started: tuple[float, float, int] = (0.0, 0.0, 0)

    def start(self) -> None:
        self._started = (time.perf_counter(), time.process_time(), _page_faults())

    def stop(self, rows: int) -> None:
        wall, cpu, faults = self._started
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        self.epochs.append(
            {
                "samples": rows,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "samples_per_second": rows / seconds,
                "samples_per_cpu_second": rows / cpu_seconds,
                "page_faults": _page_faults() - faults,
            }
        )


def parse_options(*variants: str) -> argparse.Namespace:
    """Options of the command line; sets threads, core and seed as they say.

    Args:
        variants: what ``--variant`` may be, the default first.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder that dataset.py made")
    parser.add_argument("--variant", choices=variants, default=variants[0])
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int, help="CPU core to stay on; any without")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for temporary files")
    options = parser.parse_args()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    # Contenders may print what they like; standard output belongs to the result.
    options.output = os.dup(1)
    os.dup2(2, 1)
    return options


def cardinalities(data: Path) -> list[int]:
    """Rows of the full table of each categorical feature."""
    features = json.loads((data / "manifest.json").read_text())["categorical"]
    return [feature["num_embeddings"] for feature in features]


def parquet_file(data: Path, split: str) -> Path:
    return data / split / "part-00000.parquet"


def column(table: pa.Table, name: str) -> np.ndarray:
    """A column as numpy array; Arrow's own to_numpy imports pandas, 40 MB that no contender should be charged for."""
    return np.from_dlpack(table[name].combine_chunks()).copy()


def labels(data: Path, split: str) -> np.ndarray:
    """(rows,) int8."""
    file = pq.ParquetFile(parquet_file(data, split))
    return column(file.read(columns=["label"], use_threads=False), "label")


def area_under_curve(truth: np.ndarray, scores: np.ndarray) -> float:
    """Exact AUC, ties counted one half (Mann-Whitney U by mean ranks)."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2
    positives = truth == 1
    num_positives = int(positives.sum())
    rank_sum = mean_ranks[inverse[positives]].sum()
    pairs = num_positives * (len(truth) - num_positives)
    return float((rank_sum - num_positives * (num_positives + 1) / 2) / pairs)


def report(options: argparse.Namespace, clock: EpochClock, truth: np.ndarray, scores: np.ndarray) -> None:
    """Print the result.

    Args:
        options: from ``parse_options``.
        clock: with all epochs.
        truth: (rows,) labels of the validation split.
        scores: (rows,) scores after the first epoch, probabilities or logits.
    """
    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "torchrec", "fbgemm-gpu-cpu", "deepctr-torch", "fuxictr", "recemb", "numpy", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    result = {
        "epochs": clock.epochs,
        "auc": area_under_curve(truth, np.asarray(scores, dtype=np.float64)),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": versions,
    }
    os.write(options.output, (json.dumps(result) + "\n").encode())


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
