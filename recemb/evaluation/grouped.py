"""AUC inside each group of rows: by user for GAUC, by the values of a column for slices.

References: Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017, arXiv:1703.02091 (GAUC);
Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv:1706.06978 (section 5.3).

Shapes: n rows, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from recemb.evaluation.checks import Array, Floats, Integers, check_labels, check_scores

Weighting = Literal["impressions", "users"]


# Comparing arrays has no one answer, so no generated ==.
@dataclass(frozen=True, eq=False)
class GroupedAuc:
    """The AUC of each group.

    Args:
        values: (G,) the distinct values of the grouping column, in order of first appearance.
        codes: (n,) position in ``values`` of each row's group.
        rows: (G,) rows (impressions) of each group.
        positives: (G,) rows with label 1.
        auc: (G,) float64, NaN for a group of one class, whose AUC does not exist.
    """

    values: Array
    codes: Integers
    rows: Integers
    positives: Integers
    auc: Floats

    @property
    def num_groups(self) -> int:
        return len(self.rows)

    @property
    def num_left_out(self) -> int:
        """Groups with rows of one class only, in which nothing can be ranked."""
        return int(np.isnan(self.auc).sum())

    @property
    def rows_left_out(self) -> int:
        """Rows that belong to the groups left out."""
        return int(self.rows[np.isnan(self.auc)].sum())

    def mean(self, weighting: Weighting = "impressions") -> float:
        """Mean AUC over the groups that have both classes.

        Args:
            weighting: ``"impressions"`` weighs a group by its rows (what papers call GAUC); ``"users"`` gives every
                group the same weight, so that heavy users do not decide.

        Raises:
            ValueError: another weighting, or no group has both classes.
        """
        if weighting not in get_args(Weighting):
            raise ValueError(f"weighting: must be one of {get_args(Weighting)}, got {weighting!r}")
        kept = ~np.isnan(self.auc)
        if not kept.any():
            raise ValueError(
                f"gauc: a user with labels of both classes is required, all {self.num_groups} users have one class only"
            )
        weights = self.rows[kept] if weighting == "impressions" else None
        return float(np.average(self.auc[kept], weights=weights))


def grouped_auc(
    labels: npt.ArrayLike, scores: npt.ArrayLike, groups: npt.ArrayLike, *, missing_is_a_group: bool = False
) -> GroupedAuc:
    """Exact AUC of every group at once, ties counted half: O(n log n), no loop over groups.

    Args:
        labels: (n,) 0 or 1.
        scores: (n,) any increasing function of the prediction: probabilities or logits.
        groups: (n,) integers or strings: the user, or the slice, a row belongs to.
        missing_is_a_group: None and NaN form a group of their own (slices) instead of being an error (users).

    Raises:
        ValueError: labels or scores as in ``metrics.auc``; another number of groups than rows; a missing group.
    """
    checked = check_labels(labels)
    values = check_scores(scores, len(checked))
    codes, distinct = _codes(groups, len(checked), missing_is_a_group)

    # One integer a row, group above score above label, so that a single sort (vectorised in numpy, unlike a lexsort)
    # lays out groups, ties inside groups, and keeps the label at hand.
    order, order_bits = _order_keys(values)
    if max(len(distinct) - 1, 1).bit_length() + order_bits + 1 > 64:
        raise ValueError(f"groups: {len(distinct)} groups of {len(checked)} rows are too many for 64-bit sort keys")
    keys = (codes.astype(np.uint64) << np.uint64(order_bits + 1)) | (order << np.uint64(1)) | checked
    keys.sort()

    tied = keys >> np.uint64(1)
    tie_starts = _starts(tied)
    tie_group = (tied[tie_starts] >> np.uint64(order_bits)).astype(np.int64)
    positives = np.add.reduceat((keys & np.uint64(1)).astype(np.int64), tie_starts)
    negatives = np.diff(tie_starts, append=len(keys)) - positives
    group_starts = _starts(tie_group)

    # Negatives below a tie, counted from the start of its group; pairs are doubled so that halves stay integers.
    below = np.cumsum(negatives) - negatives
    below -= below[group_starts][tie_group]
    doubled_pairs = np.add.reduceat(positives * (2 * below + negatives), group_starts)
    group_positives = np.add.reduceat(positives, group_starts)
    group_negatives = np.add.reduceat(negatives, group_starts)
    pairs = group_positives * group_negatives
    auc = np.full(len(pairs), np.nan)
    np.divide(doubled_pairs, 2 * pairs, out=auc, where=pairs > 0)
    return GroupedAuc(distinct, codes, group_positives + group_negatives, group_positives, auc)


def _codes(groups: npt.ArrayLike, rows: int, missing_is_a_group: bool) -> tuple[Integers, Array]:
    """Row -> position of its group among the distinct ones."""
    array = np.asarray(groups)
    if array.ndim != 1 or len(array) != rows:
        raise ValueError(f"groups: one value a label is required, got shape {array.shape} and {rows} labels")
    codes, distinct = pd.factorize(array, use_na_sentinel=not missing_is_a_group)
    if (codes < 0).any():
        missing = codes < 0
        raise ValueError(
            f"groups: a user in every row is required, missing in row {int(missing.argmax())} "
            f"({int(missing.sum())} of {rows} rows have none)"
        )
    return codes.astype(np.int64, copy=False), np.asarray(distinct)


def _order_keys(scores: Array) -> tuple[npt.NDArray[np.uint64], int]:
    """(unsigned integers in the order of ``scores``, equal where they are equal; bits they need)."""
    with np.errstate(over="ignore"):
        narrow = scores.astype(np.float32)
    # Integers are left to the ranks: above 2**53 they would seem equal to a float32 that they are not.
    if scores.dtype.kind == "f" and np.array_equal(narrow, scores):
        # float32 sorts like its bits once negatives are flipped; adding 0 makes one zero of -0.0 and 0.0.
        bits = (narrow + np.float32(0)).view(np.uint32)
        flip = np.where(bits >> np.uint32(31) == 1, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
        return (bits ^ flip).astype(np.uint64), 32
    distinct, ranks = np.unique(scores, return_inverse=True)
    return ranks.astype(np.uint64), max(len(distinct) - 1, 1).bit_length()


def _starts(values: npt.NDArray[np.integer]) -> Integers:
    """Positions at which a run of equal values begins."""
    return np.concatenate(([0], np.flatnonzero(values[1:] != values[:-1]) + 1))
