"""What every metric requires of its labels and scores, checked in one place; nothing is repaired.

Shapes: n rows (impressions).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Booleans = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def check_labels(labels: npt.ArrayLike) -> Booleans:
    """(n,) labels of any numeric dtype or bool -> (n,) bool.

    Raises:
        ValueError: not one-dimensional, empty, not numbers, or a value that is neither 0 nor 1 (its row is named).
    """
    array = _vector("labels", labels)
    if array.dtype == np.bool_:
        return array.astype(np.bool_, copy=False)
    positive = array == 1
    wrong = ~(positive | (array == 0))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"labels: each must be 0 or 1, got {array[row]} in row {row} "
            f"({int(wrong.sum())} of {len(array)} rows are neither)"
        )
    return positive


def check_scores(scores: npt.ArrayLike, rows: int) -> Array:
    """(n,) finite scores, one a label; float16 is widened to float32, every other dtype is kept (widening costs time).

    Raises:
        ValueError: another length than the labels, not numbers, or NaN/inf (the first such row is named).
    """
    array = _vector("scores", scores)
    if len(array) != rows:
        raise ValueError(f"scores: one score a label is required, got {len(array)} scores and {rows} labels")
    if array.dtype.kind != "f":
        return array
    if not np.isfinite(array).all():
        wrong = ~np.isfinite(array)
        row = int(wrong.argmax())
        raise ValueError(
            f"scores: each must be finite, got {array[row]} in row {row} "
            f"({int(wrong.sum())} of {rows} rows are NaN or inf)"
        )
    return array.astype(np.float32) if array.dtype == np.float16 else array


def check_probabilities(probabilities: npt.ArrayLike, rows: int) -> Floats:
    """(n,) float64 in [0, 1], one a label.

    Raises:
        ValueError: as check_scores, or a value outside [0, 1], which is what a logit given as a probability looks like.
    """
    array = check_scores(probabilities, rows)
    if array.min() < 0 or array.max() > 1:
        wrong = (array < 0) | (array > 1)
        row = int(wrong.argmax())
        raise ValueError(
            f"scores: a probability in [0, 1] is required, got {array[row]} in row {row} "
            f"({int(wrong.sum())} of {rows} rows are outside); if these are logits, pass them as logits"
        )
    return array.astype(np.float64, copy=False)


def check_both_classes(labels: Booleans, where: str) -> tuple[int, int]:
    """(number of 1 labels, number of 0 labels); ValueError where one is 0, with ``where``: the metric or file."""
    positives = int(np.count_nonzero(labels))
    if positives in (0, len(labels)):
        raise ValueError(
            f"{where}: labels of both classes are required, got {positives} rows with label 1 and "
            f"{len(labels) - positives} with label 0"
        )
    return positives, len(labels) - positives


def _vector(name: str, values: npt.ArrayLike) -> Array:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name}: a one-dimensional array is required, got shape {array.shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: numbers are required, got dtype {array.dtype}")
    if len(array) == 0:
        raise ValueError(f"{name}: at least one row is required, got an empty array")
    return array
