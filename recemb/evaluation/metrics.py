"""Metrics of click probabilities, exact and in float64.

Every function takes ``(labels, scores)``: (n,) labels in {0, 1} (bool, integer or float) and (n,) scores, which are
probabilities for all but ``auc`` and ``gauc``, where any increasing function of them (logits) does as well. NaN, inf,
labels outside {0, 1}, empty input and unequal lengths raise ValueError naming the row; nothing is dropped, and nothing
clipped unless stated.

Ten million rows take a fraction of a second each: sums run over blocks that stay in the cache, sorts are numpy's
vectorised ones on values (never an argsort).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
from recemb.evaluation.grouped import Weighting, grouped_auc

# A probability of exactly 0 or 1 that proves wrong would cost an infinite log loss. As in scikit-learn, probabilities
# are kept this far away from 0 and 1 (float64 machine epsilon), so that such a row costs 36.04 nats.
PROBABILITY_MARGIN = float(np.finfo(np.float64).eps)
DEFAULT_NUM_BINS = 15
Binning = Literal["width", "mass"]
_BLOCK_ROWS = 1 << 16


def auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Area under the ROC curve: the chance that a click is scored above a non-click, ties counted half.

    The number of ordered pairs is an exact integer, so the result is the correctly rounded quotient, whatever the ties.
    O(n log n).

    Raises:
        ValueError: bad input (see the module), or labels of one class only.
    """
    checked = check_labels(labels)
    values = check_scores(scores, len(checked))
    num_positives, num_negatives = check_both_classes(checked, "auc")
    positives = np.sort(values[checked])
    negatives = np.sort(values[~checked])
    # The needles are sorted too, which makes the search run along the haystack instead of jumping through it.
    if num_positives <= num_negatives:
        below = np.searchsorted(negatives, positives, side="left").sum()
        not_above = np.searchsorted(negatives, positives, side="right").sum()
    else:
        total = num_positives * num_negatives
        below = total - np.searchsorted(positives, negatives, side="right").sum()
        not_above = total - np.searchsorted(positives, negatives, side="left").sum()
    return (int(below) + int(not_above)) / (2 * num_positives * num_negatives)


def gauc(
    labels: npt.ArrayLike, scores: npt.ArrayLike, users: npt.ArrayLike, *, weighting: Weighting = "impressions"
) -> float:
    """Mean of the AUCs of single users; users with labels of one class only are left out of sum and weights.

    ``grouped.grouped_auc`` gives the AUC of each user and how many were left out.

    Args:
        labels: (n,) 0 or 1.
        scores: (n,) probabilities or logits.
        users: (n,) integers or strings.
        weighting: ``"impressions"`` weighs a user by their rows, ``"users"`` weighs all alike.

    Raises:
        ValueError: bad input, a missing user, another weighting, or no user with both classes.

    Reference: Zhu et al., arXiv:1703.02091; Zhou et al., arXiv:1706.06978.
    """
    return grouped_auc(labels, scores, users).mean(weighting)


def log_loss(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean negative log likelihood, in nats.

    Probabilities nearer to 0 or 1 than 2.2e-16 count as 2.2e-16 away (scikit-learn's convention). A sigmoid computed in
    float32 is exactly 1 from a logit of 17 on: where logits are at hand, ``log_loss_from_logits`` needs no such margin.

    Raises:
        ValueError: bad input, or a value outside [0, 1].
    """
    checked = check_labels(labels)
    return mean(row_losses(checked, check_probabilities(probabilities, len(checked))))


def log_loss_from_logits(labels: npt.ArrayLike, logits: npt.ArrayLike) -> float:
    """Mean negative log likelihood of ``sigmoid(logits)``, in nats, from the logits: never clipped, never infinite.

    Raises:
        ValueError: bad input.
    """
    checked = check_labels(labels)
    return mean(row_losses_from_logits(checked, check_scores(logits, len(checked))))


def row_losses(labels: Booleans, probabilities: Floats) -> Floats:
    """(n,) negative log likelihood of each row, of checked input; see ``log_loss`` for probabilities of 0 and 1."""
    losses = np.empty(len(labels))
    for rows in _blocks(len(labels)):
        inside = np.clip(probabilities[rows], PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN)
        np.negative(np.where(labels[rows], np.log(inside), np.log1p(-inside)), out=losses[rows])
    return losses


def row_losses_from_logits(labels: Booleans, logits: Array) -> Floats:
    """(n,) softplus(-logit) where the label is 1, softplus(logit) where it is 0, of checked input."""
    losses = np.empty(len(labels))
    for rows in _blocks(len(labels)):
        # The sign that makes a wrong answer positive; softplus(x) = max(x, 0) + log(1 + exp(-|x|)) cannot overflow.
        wrong = np.where(labels[rows], -1.0, 1.0) * logits[rows].astype(np.float64)
        np.add(np.maximum(wrong, 0.0), np.log1p(np.exp(-np.abs(wrong))), out=losses[rows])
    return losses


def sigmoid(logits: npt.ArrayLike) -> Floats:
    """(n,) logits -> (n,) float64 probabilities, without overflow."""
    values = np.asarray(logits)
    probabilities = np.empty(len(values))
    for rows in _blocks(len(values)):
        wide = values[rows].astype(np.float64)
        small = np.exp(-np.abs(wide))
        np.divide(np.where(wide >= 0, 1.0, small), 1.0 + small, out=probabilities[rows])
    return probabilities


def normalised_entropy(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Log loss over the log loss of always predicting the observed click rate: below 1 beats that constant.

    Unlike log loss it compares between data of different click rates. Probabilities of 0 and 1 as in ``log_loss``.

    Raises:
        ValueError: bad input, a value outside [0, 1], or labels of one class only (the constant then costs nothing).

    Reference: He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014.
    """
    return log_loss(labels, probabilities) / base_entropy(labels)


def base_entropy(labels: npt.ArrayLike) -> float:
    """Log loss of always predicting the observed click rate, in nats; ValueError for labels of one class only."""
    checked = check_labels(labels)
    num_positives, num_negatives = check_both_classes(checked, "normalised_entropy")
    rate = num_positives / len(checked)
    return -(rate * math.log(rate) + (1 - rate) * math.log(num_negatives / len(checked)))


def calibration(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Predicted clicks over observed clicks: 1 is calibrated on the whole, 1.1 promises 10% too many.

    Raises:
        ValueError: bad input, a value outside [0, 1], or no row with label 1.
    """
    checked = check_labels(labels)
    values = check_probabilities(probabilities, len(checked))
    positives = int(np.count_nonzero(checked))
    if positives == 0:
        raise ValueError(f"calibration: a row with label 1 is required, got none in {len(checked)} rows")
    return mean(values) * len(checked) / positives


# Comparing arrays has no one answer, so no generated ==.
@dataclass(frozen=True, eq=False)
class ReliabilityTable:
    """Predictions in bins, beside what happened there; only bins with rows.

    Args:
        binning: ``"width"`` or ``"mass"``.
        lower, upper: (K,) a bin holds predictions with ``lower <= p < upper``, the last one ``p = upper`` as well.
        rows: (K,) rows in each bin.
        prediction: (K,) mean prediction.
        observed: (K,) share of rows with label 1.
    """

    binning: Binning
    lower: Floats
    upper: Floats
    rows: Integers
    prediction: Floats
    observed: Floats

    @property
    def expected_error(self) -> float:
        """Expected calibration error: mean over rows of |prediction - observed| of the row's bin, in [0, 1]."""
        return float(np.average(np.abs(self.prediction - self.observed), weights=self.rows))

    @property
    def largest_error(self) -> float:
        """Maximum calibration error: the largest |prediction - observed| of a bin."""
        return float(np.abs(self.prediction - self.observed).max())

    def to_dict(self) -> dict[str, Any]:
        names = ("lower", "upper", "rows", "prediction", "observed")
        return {"binning": self.binning, **{name: getattr(self, name).tolist() for name in names}}


def reliability_table(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, *, num_bins: int = DEFAULT_NUM_BINS, binning: Binning = "width"
) -> ReliabilityTable:
    """Sort predictions into bins and compare the mean prediction of each with its share of clicks.

    Args:
        labels: (n,) 0 or 1.
        probabilities: (n,) in [0, 1].
        num_bins: bins; 15 as in Guo et al. More bins see finer errors, but each adds noise: keep a thousand rows a bin.
        binning: ``"width"``: bins of width 1/num_bins over [0, 1]. ``"mass"``: bins of n/num_bins rows, which is what
            low click rates need, where nearly all predictions share the first equal-width bin. Equal predictions
            never lie in two bins, so there can be fewer than num_bins.

    Raises:
        ValueError: bad input, a value outside [0, 1], num_bins below 1, another binning.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599.
    Differs from the paper: bins are closed on the left, and over the click probability, not the winning class's.
    """
    checked = check_labels(labels)
    values = check_probabilities(probabilities, len(checked))
    if num_bins < 1:
        raise ValueError(f"num_bins: must be at least 1, got {num_bins}")
    if binning not in get_args(Binning):
        raise ValueError(f"binning: must be one of {get_args(Binning)}, got {binning!r}")
    if binning == "width":
        edges = np.arange(num_bins + 1) / num_bins
    else:
        ordered = np.sort(values)
        cuts = (np.arange(num_bins) * len(values)) // num_bins
        edges = np.append(np.unique(ordered[cuts]), ordered[-1])
    last = len(edges) - 2
    rows, clicks, total = np.zeros(last + 1, np.int64), np.zeros(last + 1, np.int64), np.zeros(last + 1)
    for block in _blocks(len(values)):
        bins = np.minimum(np.searchsorted(edges, values[block], side="right") - 1, last)
        rows += np.bincount(bins, minlength=last + 1)
        clicks += np.bincount(bins[checked[block]], minlength=last + 1)
        total += np.bincount(bins, weights=values[block], minlength=last + 1)
    kept = rows > 0
    return ReliabilityTable(
        binning=binning,
        lower=edges[:-1][kept],
        upper=edges[1:][kept],
        rows=rows[kept],
        prediction=total[kept] / rows[kept],
        observed=clicks[kept] / rows[kept],
    )


def expected_calibration_error(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, *, num_bins: int = DEFAULT_NUM_BINS, binning: Binning = "width"
) -> float:
    """Mean over rows of |mean prediction - share of clicks| of the row's bin, in [0, 1]; see ``reliability_table``."""
    return reliability_table(labels, probabilities, num_bins=num_bins, binning=binning).expected_error


def relative_improvement(value: float, baseline: float) -> float:
    """RelaImpr of an AUC over a baseline's, in percent: 100 * ((value - 0.5) / (baseline - 0.5) - 1).

    A random ranking has AUC 0.5, so only what lies above it is compared.

    Raises:
        ValueError: an AUC outside [0, 1], or a baseline not above 0.5, for which the quotient has no meaning.

    Reference: Yan et al., "Coupled Group Lasso for Web-Scale CTR Prediction", ICML 2014; used by arXiv:1706.06978.
    """
    if not (0 <= value <= 1 and 0.5 < baseline <= 1):
        raise ValueError(
            "relative_improvement: an AUC in [0, 1] and a baseline in (0.5, 1] are required, "
            f"got {value} and {baseline}"
        )
    return 100 * ((value - 0.5) / (baseline - 0.5) - 1)


def mean(values: Floats) -> float:
    """Mean of float64 values, blocks summed pairwise and added exactly."""
    return math.fsum(float(values[rows].sum()) for rows in _blocks(len(values))) / len(values)


def _blocks(rows: int) -> Iterator[slice]:
    """Slices of a size whose temporaries stay in the second-level cache."""
    return (slice(start, start + _BLOCK_ROWS) for start in range(0, rows, _BLOCK_ROWS))
