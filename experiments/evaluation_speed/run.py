"""Seconds that metrics take at 10 million scores, beside scikit-learn where it has the metric, in one run.

    python experiments/evaluation_speed/run.py [--rows 10000000] [--repeats 3]

Both sides of a ratio are timed alternately, the best of the repeats counts. Writes results/evaluation_speed.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sklearn
import sklearn.metrics

from recemb.evaluation import metrics
from recemb.evaluation.bootstrap import bootstrap
from recemb.evaluation.grouped import grouped_auc

NUM_USERS_FRACTION = 0.05
REPLICATES = 20


def best_seconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest of ``repeats`` calls of each, called in turns."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure(rows: int, repeats: int) -> dict[str, object]:
    """All timings, and how far the AUC is from scikit-learn's."""
    generator = np.random.default_rng(0)
    logits = generator.normal(-1.5, 1.1, rows).astype(np.float32)
    probabilities = metrics.sigmoid(logits)
    labels = generator.random(rows) < probabilities
    users = generator.integers(0, max(1, int(rows * NUM_USERS_FRACTION)), rows)
    groups = grouped_auc(labels, logits, users)

    pairs = best_seconds(
        {
            "auc": lambda: metrics.auc(labels, logits),
            "auc_scikit_learn": lambda: sklearn.metrics.roc_auc_score(labels, logits),
            "log_loss": lambda: metrics.log_loss(labels, probabilities),
            "log_loss_scikit_learn": lambda: sklearn.metrics.log_loss(labels, probabilities),
        },
        repeats,
    )
    others = best_seconds(
        {
            "auc_float64": lambda: metrics.auc(labels, probabilities),
            "log_loss_from_logits": lambda: metrics.log_loss_from_logits(labels, logits),
            "calibration": lambda: metrics.calibration(labels, probabilities),
            "calibration_error_equal_width": lambda: metrics.expected_calibration_error(labels, probabilities),
            "calibration_error_equal_mass": lambda: metrics.expected_calibration_error(
                labels, probabilities, binning="mass"
            ),
            "gauc": lambda: metrics.gauc(labels, logits, users),
        },
        repeats,
    )
    resampled = best_seconds(
        {
            "bootstrap_replicate": lambda: bootstrap(labels, probabilities, scores=logits, replicates=REPLICATES),
            "bootstrap_replicate_users": lambda: bootstrap(
                labels, probabilities, scores=logits, users=groups, replicates=REPLICATES
            ),
        },
        1,
    )
    return {
        "rows": rows,
        "users": groups.num_groups,
        "seconds": {**pairs, **others, **{name: value / REPLICATES for name, value in resampled.items()}},
        "scikit_learn_over_recemb": {name: pairs[f"{name}_scikit_learn"] / pairs[name] for name in ("auc", "log_loss")},
        "auc_difference": metrics.auc(labels, logits) - sklearn.metrics.roc_auc_score(labels, logits),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "environment": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scikit_learn": sklearn.__version__,
            "processor": platform.processor() or platform.machine(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    result = measure(arguments.rows, arguments.repeats)
    path = Path(__file__).parent / "results" / "evaluation_speed.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    json.dump(result, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
