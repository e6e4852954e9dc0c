"""When to stop: no better on the validation split for so many validations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from recemb.evaluation.predictions import Diverged

# Metric that may stop a training -> 1 where higher is better, -1 where lower is.
SIGNS = {"auc": 1, "gauc": 1, "logloss": -1}


class EarlyStopping:
    """Remembers the best validation and says when waiting for a better one has lasted long enough.

    Args:
        metric: ``"auc"`` or ``"gauc"`` (higher is better) or ``"logloss"`` (lower is better). CTR models overfit in log
            loss first: ``"logloss"`` stops earlier and keeps the probabilities calibrated, ``"auc"`` ranks best,
            ``"gauc"`` ranks best what one user sees and needs a user column.
        patience: validations without improvement before stopping; None never stops, and still knows the best.
        min_delta: smallest change that counts, in the metric's unit; 0.0 takes any.

    Raises:
        ValueError: another metric, patience below 1 or a negative min_delta.
    """

    def __init__(self, *, metric: str = "auc", patience: int | None = 2, min_delta: float = 0.0) -> None:
        if metric not in SIGNS:
            raise ValueError(f"stopping: metric must be 'auc', 'gauc' or 'logloss', got {metric!r}")
        if patience is not None and patience < 1:
            raise ValueError(f"stopping: patience must be at least 1, or None for never, got {patience}")
        if not min_delta >= 0.0:
            raise ValueError(f"stopping: min_delta must be at least 0, got {min_delta}")
        self.metric = metric
        self.patience = patience
        self.min_delta = min_delta
        self.best_value: float | None = None
        self.best_step: int | None = None
        self.validations_without_improvement = 0

    @property
    def should_stop(self) -> bool:
        return self.patience is not None and self.validations_without_improvement >= self.patience

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take in the metrics of a validation after ``step`` steps; True when they are the best so far.

        Raises:
            ValueError: the metric is missing.
            Diverged: it is not finite.
        """
        if self.metric not in metrics:
            raise ValueError(f"stopping: validation gave {sorted(metrics)}, not {self.metric!r}")
        value = float(metrics[self.metric])
        if not math.isfinite(value):
            raise Diverged(f"stopping: validation {self.metric} after step {step} is {value}")
        gain = 0.0
        if self.best_value is not None:
            gain = SIGNS[self.metric] * (value - self.best_value)
        if self.best_value is None or gain > self.min_delta:
            self.best_value, self.best_step = value, step
            self.validations_without_improvement = 0
            return True
        self.validations_without_improvement += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_value": self.best_value,
            "best_step": self.best_step,
            "validations_without_improvement": self.validations_without_improvement,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best_value = state["best_value"]
        self.best_step = state["best_step"]
        self.validations_without_improvement = state["validations_without_improvement"]
