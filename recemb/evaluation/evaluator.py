"""All metrics of one set of predictions, as one result that goes to JSON and to the screen.

Shapes: n rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recemb.data.manifest import TRUE_PROBABILITY
from recemb.evaluation import metrics
from recemb.evaluation.bootstrap import BootstrapResult, bootstrap
from recemb.evaluation.checks import Array, Floats
from recemb.evaluation.grouped import GroupedAuc, grouped_auc
from recemb.evaluation.metrics import DEFAULT_NUM_BINS, PROBABILITY_MARGIN, ReliabilityTable, reliability_table
from recemb.evaluation.predictions import Predictions, collect

if TYPE_CHECKING:
    # Importing it imports TorchRec: seconds, and nothing that metrics of a Parquet file need.
    from recemb.data.batch import Batch

DEFAULT_MAX_SLICES = 50


@dataclass(frozen=True)
class UserMetrics:
    """AUC inside users.

    Args:
        gauc: mean over users that have both classes, weighted by their rows; None where every user has one class only.
        gauc_users: the same with equal weights.
        num_users: distinct users.
        num_users_left_out: users with rows of one class only, in whom nothing can be ranked.
        rows_left_out: rows of those users.
    """

    gauc: float | None
    gauc_users: float | None
    num_users: int
    num_users_left_out: int
    rows_left_out: int


@dataclass(frozen=True)
class SliceRow:
    """Metrics of the rows with one value of a slice column; None where labels of one class leave them undefined."""

    value: Any
    rows: int
    positives: int
    auc: float | None
    logloss: float
    calibration: float | None


@dataclass(frozen=True)
class SliceMetrics:
    """A slice column's largest values.

    Args:
        slices: by falling number of rows.
        num_values: distinct values in the data.
        num_one_class: values whose rows all have one label, so no AUC.
        rows_not_listed: rows of the values beyond those listed.
    """

    slices: tuple[SliceRow, ...]
    num_values: int
    num_one_class: int
    rows_not_listed: int


@dataclass(frozen=True)
class Optimum:
    """Metrics of the probabilities from which synthetic labels were drawn: nothing does better, but by luck."""

    auc: float
    logloss: float


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate_predictions`` found.

    Args:
        rows, positives: rows, and those with label 1.
        auc, logloss, normalised_entropy, calibration: see ``recemb.evaluation.metrics``.
        rows_certain_and_wrong: rows whose probability was 0 or 1 (within 2.2e-16) and wrong, and which cost 36.04 nats
            instead of infinity; always 0 for logits, which need no margin.
        equal_width, equal_mass: the reliability tables.
        users: None without a user column.
        slices: by slice column.
        bootstrap: None where not asked for.
        optimum: None but for synthetic data.
        relative_improvement: RelaImpr over a baseline's AUC, in percent; None without one.
    """

    rows: int
    positives: int
    auc: float
    logloss: float
    normalised_entropy: float
    calibration: float
    rows_certain_and_wrong: int
    equal_width: ReliabilityTable
    equal_mass: ReliabilityTable
    users: UserMetrics | None = None
    slices: Mapping[str, SliceMetrics] = field(default_factory=dict)
    bootstrap: BootstrapResult | None = None
    optimum: Optimum | None = None
    relative_improvement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts for JSON: no NaN, absent parts left out."""
        content: dict[str, Any] = {
            "rows": self.rows,
            "positives": self.positives,
            "click_rate": self.positives / self.rows,
            "auc": self.auc,
            "logloss": self.logloss,
            "normalised_entropy": self.normalised_entropy,
            "calibration": self.calibration,
            "rows_certain_and_wrong": self.rows_certain_and_wrong,
            "expected_calibration_error": self.equal_width.expected_error,
            "expected_calibration_error_equal_mass": self.equal_mass.expected_error,
            "reliability": [self.equal_width.to_dict(), self.equal_mass.to_dict()],
        }
        for name in ("users", "optimum", "bootstrap"):
            part = getattr(self, name)
            if part is not None:
                content[name] = asdict(part)
        if self.slices:
            content["slices"] = {name: asdict(part) for name, part in self.slices.items()}
        if self.relative_improvement is not None:
            content["relative_improvement"] = self.relative_improvement
        return content

    def table(self) -> str:
        """A short table for people: metric, value, interval."""
        intervals = {} if self.bootstrap is None else self.bootstrap.intervals
        values = {
            "auc": self.auc,
            "logloss": self.logloss,
            "normalised_entropy": self.normalised_entropy,
            "calibration": self.calibration,
            "calibration error (width)": self.equal_width.expected_error,
            "calibration error (mass)": self.equal_mass.expected_error,
        }
        if self.users is not None and self.users.gauc is not None and self.users.gauc_users is not None:
            values |= {"gauc": self.users.gauc, "gauc_users": self.users.gauc_users}
        lines = [f"{'rows':<28}{self.rows:>12,}   {self.positives / self.rows:.4%} with label 1"]
        for name, value in values.items():
            interval = intervals.get(name)
            suffix = "" if interval is None else f"   [{interval.low:.6f}, {interval.high:.6f}]"
            lines.append(f"{name.replace('_', ' '):<28}{value:>12.6f}{suffix}")
        if self.bootstrap is not None:
            lines[0] += f"; [..] {self.bootstrap.confidence:.0%} bootstrap over {self.bootstrap.resampled}"
        if self.users is not None:
            lines.append(
                f"{'users left out of gauc':<28}{self.users.num_users_left_out:>12,}   of {self.users.num_users:,}: "
                f"labels of one class ({self.users.rows_left_out:,} rows)"
            )
        if self.optimum is not None:
            lines.append(f"{'optimum auc':<28}{self.optimum.auc:>12.6f}   gap {self.optimum.auc - self.auc:.6f}")
            lines.append(
                f"{'optimum logloss':<28}{self.optimum.logloss:>12.6f}   gap {self.logloss - self.optimum.logloss:.6f}"
            )
        if self.relative_improvement is not None:
            lines.append(f"{'RelaImpr over baseline (%)':<28}{self.relative_improvement:>12.3f}")
        return "\n".join(lines)


def evaluate(
    model: Callable[..., torch.Tensor],
    loader: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    user_column: str | None = None,
    slice_columns: Sequence[str] = (),
    replicates: int = 0,
) -> Evaluation:
    """``collect`` the model's predictions over a loader and ``evaluate_predictions``: exact over all ranks.

    The loader's ``extra_columns`` must hold the user and slice columns. Raises as the two do.
    """
    predictions = collect(model, loader, device=device)
    return evaluate_predictions(
        predictions, user_column=user_column, slice_columns=slice_columns, replicates=replicates
    )


def evaluate_predictions(
    predictions: Predictions,
    *,
    user_column: str | None = None,
    slice_columns: Sequence[str] = (),
    max_slices: int = DEFAULT_MAX_SLICES,
    num_bins: int = DEFAULT_NUM_BINS,
    replicates: int = 0,
    confidence: float = 0.95,
    seed: int = 0,
    baseline_auc: float | None = None,
) -> Evaluation:
    """Every metric of the predictions.

    Args:
        predictions: with the user and slice columns among its columns; a column ``true_probability`` gives the optimum.
        user_column: groups rows for GAUC; None for none. Intervals then resample users.
        slice_columns: columns by whose values metrics are split; a missing value is a value.
        max_slices: values listed of each slice column, those with the most rows.
        num_bins: bins of both reliability tables.
        replicates, confidence, seed: of the bootstrap; 0 replicates for no intervals.
        baseline_auc: gives RelaImpr over it.

    Raises:
        ValueError: labels of one class only, a column that is not there, a missing user.
    """
    labels, scores = predictions.labels, predictions.scores
    # First, because nothing below is defined for labels of one class and this says so soonest.
    entropy = metrics.base_entropy(labels)
    probabilities, losses = predictions.probabilities(), predictions.losses()
    logloss, area = metrics.mean(losses), metrics.auc(labels, scores)
    groups = None if user_column is None else _group_by_user(user_column, predictions)
    return Evaluation(
        rows=len(labels),
        positives=int(np.count_nonzero(labels)),
        auc=area,
        logloss=logloss,
        normalised_entropy=logloss / entropy,
        calibration=metrics.calibration(labels, probabilities),
        rows_certain_and_wrong=0 if predictions.are_logits else _certain_and_wrong(labels, probabilities),
        equal_width=reliability_table(labels, probabilities, num_bins=num_bins, binning="width"),
        equal_mass=reliability_table(labels, probabilities, num_bins=num_bins, binning="mass"),
        users=None if groups is None else _user_metrics(groups),
        slices={name: _slice_metrics(predictions, name, probabilities, losses, max_slices) for name in slice_columns},
        bootstrap=None
        if replicates == 0
        else bootstrap(
            labels,
            probabilities,
            scores=scores,
            losses=losses,
            users=groups,
            replicates=replicates,
            confidence=confidence,
            seed=seed,
        ),
        optimum=_optimum(predictions),
        relative_improvement=None if baseline_auc is None else metrics.relative_improvement(area, baseline_auc),
    )


def _optimum(predictions: Predictions) -> Optimum | None:
    truth = predictions.columns.get(TRUE_PROBABILITY)
    if truth is None:
        return None
    return Optimum(metrics.auc(predictions.labels, truth), metrics.log_loss(predictions.labels, truth))


def _group_by_user(column: str, predictions: Predictions) -> GroupedAuc:
    users = predictions.column(column)
    try:
        return grouped_auc(predictions.labels, predictions.scores, users)
    except ValueError as error:
        raise ValueError(f"user column {column!r}: {error}") from error


def _certain_and_wrong(labels: Array, probabilities: Floats) -> int:
    certain_not = labels & (probabilities < PROBABILITY_MARGIN)
    certain = ~labels & (probabilities > 1 - PROBABILITY_MARGIN)
    return int(np.count_nonzero(certain_not) + np.count_nonzero(certain))


def _user_metrics(groups: GroupedAuc) -> UserMetrics:
    # Undefined where every user has one class only, which is no reason to lose the other metrics.
    is_defined = groups.num_left_out < groups.num_groups
    return UserMetrics(
        gauc=groups.mean("impressions") if is_defined else None,
        gauc_users=groups.mean("users") if is_defined else None,
        num_users=groups.num_groups,
        num_users_left_out=groups.num_left_out,
        rows_left_out=groups.rows_left_out,
    )


def _slice_metrics(
    predictions: Predictions, column: str, probabilities: Floats, losses: Floats, max_slices: int
) -> SliceMetrics:
    if max_slices < 1:
        raise ValueError(f"max_slices: must be at least 1, got {max_slices}")
    values = predictions.column(column)
    groups = grouped_auc(predictions.labels, predictions.scores, values, missing_is_a_group=True)
    loss = np.bincount(groups.codes, weights=losses, minlength=groups.num_groups)
    predicted = np.bincount(groups.codes, weights=probabilities, minlength=groups.num_groups)
    # Stable, so that values with as many rows keep their order of appearance and results can be compared.
    listed = np.argsort(-groups.rows, kind="stable")[:max_slices]
    rows = tuple(
        SliceRow(
            value=_plain(groups.values[index]),
            rows=int(groups.rows[index]),
            positives=int(groups.positives[index]),
            auc=None if math.isnan(groups.auc[index]) else float(groups.auc[index]),
            logloss=float(loss[index] / groups.rows[index]),
            calibration=float(predicted[index] / groups.positives[index]) if groups.positives[index] else None,
        )
        for index in listed
    )
    return SliceMetrics(
        slices=rows,
        num_values=groups.num_groups,
        num_one_class=groups.num_left_out,
        rows_not_listed=int(groups.rows.sum() - groups.rows[listed].sum()),
    )


def _plain(value: Any) -> Any:
    """A value JSON has: NaN, like None, is a missing one."""
    plain = value.item() if isinstance(value, np.generic) else value
    if plain is None or (isinstance(plain, float) and math.isnan(plain)):
        return None
    finite = not isinstance(plain, float) or math.isfinite(plain)
    return plain if isinstance(plain, int | float | str) and finite else str(plain)
