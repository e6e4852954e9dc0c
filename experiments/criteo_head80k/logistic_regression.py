"""The baseline of this study: hashed logistic regression (scikit-learn) on the rows the models see.

    python experiments/criteo_head80k/logistic_regression.py LOG.parquet

First 80% of the rows train, the next 10% choose C, the last 10% test. Features: every raw categorical value, and every
numeric value as floor(ln(v)^2), one-hot, hashed to 2**22 columns.
"""

from __future__ import annotations

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.feature_extraction import FeatureHasher
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

REGULARISATIONS = (0.003, 0.01, 0.03, 0.1, 0.3)


def main() -> None:
    table = pq.read_table(sys.argv[1])
    labels = table["label"].to_numpy()
    columns = [f"I{i}" for i in range(1, 14)] + [f"C{i}" for i in range(1, 27)]
    values = {name: table[name].to_pylist() for name in columns}
    rows = ([f"{name}={bucket(values[name][row])}" for name in columns] for row in range(len(labels)))
    features = FeatureHasher(2**22, input_type="string", alternate_sign=False).transform(rows)
    train, validation = round(0.8 * len(labels)), round(0.9 * len(labels))
    fits = []
    for strength in REGULARISATIONS:
        model = LogisticRegression(C=strength, solver="liblinear").fit(features[:train], labels[:train])
        scores = model.predict_proba(features[train:validation])[:, 1]
        fits.append((roc_auc_score(labels[train:validation], scores), strength, model))
    best, strength, model = max(fits, key=lambda fit: fit[0])
    scores = model.predict_proba(features[validation:])[:, 1]
    result = {
        "study": "criteo_head80k",
        "name": "logistic_regression",
        "C": strength,
        "validation": {"auc": best, "trials": len(REGULARISATIONS)},
        "test": {
            "auc": roc_auc_score(labels[validation:], scores),
            "logloss": log_loss(labels[validation:], scores),
            "rows": int(len(labels) - validation),
        },
        "train": {"samples": train},
        "versions": {"scikit-learn": version("scikit-learn"), "numpy": np.__version__},
    }
    path = Path(__file__).parent / "results" / "logistic_regression.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["test"]))


def bucket(value: str | int | None) -> str | int | None:
    if isinstance(value, int) and value > 2:
        return math.floor(math.log(value) ** 2)
    return value


if __name__ == "__main__":
    main()
