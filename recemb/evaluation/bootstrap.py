"""Confidence intervals by resampling rows, or whole users, with replacement.

A replicate never sorts again: rows are laid out once as negatives and positives in the order of their scores, and a
replicate is a vector of integer weights over them. Weights are Poisson(1), which for large n is the multinomial of the
textbook bootstrap without its fixed sum (ratios like AUC and mean loss do not see the difference), drawn from 16 random
bits a row.

Reference: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; Chamandy et al., "Estimating Uncertainty for
Massive Data Streams", 2012 (Poisson weights).

Shapes: n rows, G users, R replicates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recemb.evaluation.checks import (
    Array,
    Booleans,
    Floats,
    Integers,
    check_both_classes,
    check_labels,
    check_probabilities,
    check_scores,
)
from recemb.evaluation.grouped import GroupedAuc
from recemb.evaluation.metrics import row_losses

DEFAULT_REPLICATES = 200
_BLOCK_ROWS = 1 << 16
Weights = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Interval:
    """Percentiles of a metric over the replicates, and their standard deviation."""

    low: float
    high: float
    standard_error: float


@dataclass(frozen=True)
class BootstrapResult:
    """Intervals by metric.

    Args:
        intervals: ``auc``, ``logloss``, ``normalised_entropy``, ``calibration``; with users ``gauc``, ``gauc_users``,
            unless every user has one class only.
        confidence: probability that an interval covers, e.g. 0.95.
        replicates: replicates used.
        left_out: replicates that happened to hold labels of one class only, or no user with both, and so have no AUC or
            no GAUC; 0 but for tiny data.
        resampled: ``"rows"`` or ``"users"``.
    """

    intervals: Mapping[str, Interval]
    confidence: float
    replicates: int
    left_out: int
    resampled: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bootstrap(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    *,
    scores: npt.ArrayLike | None = None,
    losses: Floats | None = None,
    users: GroupedAuc | None = None,
    replicates: int = DEFAULT_REPLICATES,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapResult:
    """Percentile intervals of the metrics of one set of predictions.

    Args:
        labels: (n,) 0 or 1.
        probabilities: (n,) in [0, 1].
        scores: (n,) what AUC ranks by; the probabilities where not given. Logits keep apart what a sigmoid rounds to 1.
        losses: (n,) log loss of each row, computed from the probabilities where not given.
        users: users of the rows. Rows of one user resemble each other, and resampling them one by one would make
            intervals too narrow; with users, whole users are drawn, for every metric.
        replicates: R. 200 places an end of the interval within a fifth of a standard error, 1000 within a tenth; the
            time is about 15 ms a replicate per million rows, 30 with users.
        confidence: in (0, 1).
        seed: the intervals are the same for the same seed and rows.

    Raises:
        ValueError: bad input, labels of one class only, or more than half of the replicates are left out.
    """
    checked = check_labels(labels)
    values = check_probabilities(probabilities, len(checked))
    ranking = values if scores is None else check_scores(scores, len(checked))
    check_both_classes(checked, "bootstrap")
    if replicates < 2 or not 0 < confidence < 1:
        raise ValueError(
            "bootstrap: at least 2 replicates and a confidence in (0, 1) are required, "
            f"got {replicates} and {confidence}"
        )
    layout = _Layout.of(checked, values, ranking, row_losses(checked, values) if losses is None else losses, users)
    generator = np.random.Generator(np.random.SFC64(seed))
    drawn = [_replicate(layout, users, generator) for _ in range(replicates)]
    used = [item for item in drawn if item is not None]
    if len(used) < max(2, replicates / 2):
        raise ValueError(
            f"bootstrap: {replicates - len(used)} of {replicates} replicates have labels of one class only"
            f"{'' if users is None else ' or no user with both'}; {len(checked)} rows are too few"
        )
    tail = (1 - confidence) / 2
    intervals = {}
    for name in used[0]:
        series = np.array([item[name] for item in used])
        low, high = np.quantile(series, [tail, 1 - tail])
        intervals[name] = Interval(float(low), float(high), float(series.std(ddof=1)))
    return BootstrapResult(
        intervals, confidence, len(used), replicates - len(used), "rows" if users is None else "users"
    )


@dataclass(frozen=True)
class _Layout:
    """Rows in the order: negatives by rising score, then positives by rising score.

    ``below`` and ``not_above`` are, for each positive, the number of negatives scored below, and below or equal.
    """

    num_negatives: int
    below: Integers
    not_above: Integers | None  # None where no negative ties with a positive
    probabilities: Floats
    losses: Floats
    users: Integers | None

    @staticmethod
    def of(labels: Booleans, probabilities: Floats, scores: Array, losses: Floats, users: GroupedAuc | None) -> _Layout:
        negatives, positives = np.flatnonzero(~labels), np.flatnonzero(labels)
        negatives = negatives[np.argsort(scores[negatives])]
        positives = positives[np.argsort(scores[positives])]
        order = np.concatenate((negatives, positives))
        below = np.searchsorted(scores[negatives], scores[positives], side="left")
        not_above = np.searchsorted(scores[negatives], scores[positives], side="right")
        return _Layout(
            num_negatives=len(negatives),
            below=below,
            not_above=None if np.array_equal(below, not_above) else not_above,
            probabilities=probabilities[order],
            losses=losses[order],
            users=None if users is None else users.codes[order],
        )


def _replicate(layout: _Layout, users: GroupedAuc | None, generator: np.random.Generator) -> dict[str, float] | None:
    """The metrics of one resample; None where it has labels of one class only, or no user with both where there are."""
    if users is None or layout.users is None:
        of_users = None
        weights = _poisson_weights(generator, len(layout.losses))
    else:
        of_users = _poisson_weights(generator, users.num_groups)
        weights = of_users.take(layout.users)

    negatives_up_to = np.zeros(layout.num_negatives + 1)
    np.cumsum(weights[: layout.num_negatives], dtype=np.float64, out=negatives_up_to[1:])
    of_positives = weights[layout.num_negatives :].astype(np.float64)
    num_negatives, num_positives = float(negatives_up_to[-1]), float(of_positives.sum())
    if num_negatives == 0 or num_positives == 0:
        return None
    pairs = _dot(of_positives, negatives_up_to.take(layout.below))
    if layout.not_above is not None:
        pairs = (pairs + _dot(of_positives, negatives_up_to.take(layout.not_above))) / 2

    loss = predicted = 0.0
    for start in range(0, len(weights), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        wide = weights[block].astype(np.float64)
        loss += _dot(wide, layout.losses[block])
        predicted += _dot(wide, layout.probabilities[block])
    num_rows = num_positives + num_negatives
    rate = num_positives / num_rows
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
    result = {
        "auc": pairs / (num_positives * num_negatives),
        "logloss": loss / num_rows,
        "normalised_entropy": loss / num_rows / entropy,
        "calibration": predicted / num_positives,
    }
    # Where every user has one class only there is no GAUC to resample.
    if users is not None and of_users is not None and users.num_left_out < users.num_groups:
        kept = ~np.isnan(users.auc)
        drawn, impressions = of_users[kept].astype(np.float64), users.rows[kept]
        if not drawn.any():
            return None
        result["gauc"] = float(np.average(users.auc[kept], weights=drawn * impressions))
        result["gauc_users"] = float(np.average(users.auc[kept], weights=drawn))
    return result


def _dot(left: Floats, right: Floats) -> float:
    # Not np.dot: its BLAS wakes a thread a core for vectors of this size, and they stall by 10 to 100 times when
    # another process holds a core.
    return float(np.einsum("i,i->", left, right))


def _poisson_table() -> Weights:
    """65,536 numbers distributed like Poisson(1) to the nearest 65,536th, so that 16 random bits index a draw.

    Nine and more, once in 800,000 draws, fall to the largest number that still has an entry; mean and variance are
    within 1e-4 of 1.
    """
    exact = np.array([math.exp(-1) / math.factorial(count) for count in range(10)]) * 65536
    upper = np.rint(np.cumsum(exact)).astype(np.int64)
    upper[-1] = 65536
    return np.repeat(np.arange(10, dtype=np.int8), np.diff(upper, prepend=0))


_POISSON_TABLE = _poisson_table()


def _poisson_weights(generator: np.random.Generator, size: int) -> Weights:
    """(size,) independent Poisson(1) draws."""
    weights = np.empty(size, np.int8)
    for start in range(0, size, _BLOCK_ROWS):
        part = weights[start : start + _BLOCK_ROWS]
        words = generator.integers(0, 2**64, size=-(-len(part) // 4), dtype=np.uint64)
        # mode="wrap" lets take() write into `part` directly; every 16-bit index is inside the table anyway.
        _POISSON_TABLE.take(words.view(np.uint16)[: len(part)], out=part, mode="wrap")
    return weights
