"""Learning rate over steps: a factor on every optimizer's own rate, tables and dense layers alike."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up, a plateau, then decay to the last step.

    A pure function of the step, so that a resumed run needs no state but the step.

    Args:
        total_steps: steps of the whole training.
        warmup_steps: steps over which the factor rises from ``1 / warmup_steps`` to 1. Large batches want some hundreds
            (MLPerf's DLRM: 2,750 of 64,000); small ones none.
        decay: ``"none"``, ``"linear"`` or ``"cosine"``.
        decay_start_step: first step below the plateau; before the end of the warm-up it means right after it.
        final_factor: factor of the last step, in [0, 1].

    Raises:
        ValueError: a count is negative, the warm-up is longer than the training, or an unknown decay.
    """

    total_steps: int
    warmup_steps: int = 0
    decay: str = "none"
    decay_start_step: int = 0
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.decay not in ("none", "linear", "cosine"):
            raise ValueError(f"schedule: decay must be 'none', 'linear' or 'cosine', got {self.decay!r}")
        if self.total_steps < 1:
            raise ValueError(f"schedule: total_steps must be at least 1, got {self.total_steps}")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"schedule: warmup_steps must be in [0, {self.total_steps}] (steps of the training), "
                f"got {self.warmup_steps}"
            )
        if not 0 <= self.decay_start_step <= self.total_steps:
            raise ValueError(
                f"schedule: decay_start_step must be in [0, {self.total_steps}] (steps of the training), "
                f"got {self.decay_start_step}"
            )
        if not 0.0 <= self.final_factor <= 1.0:
            raise ValueError(f"schedule: final_factor must be in [0, 1], got {self.final_factor}")

    def factor(self, step: int) -> float:
        """Factor of the learning rate in step ``step`` (the first is 0)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        start = max(self.decay_start_step, self.warmup_steps)
        if self.decay == "none" or step < start:
            return 1.0
        # The last step reaches final_factor itself, not one step short of it.
        progress = min(1.0, (step - start + 1) / max(1, self.total_steps - start))
        shape = progress if self.decay == "linear" else (1.0 - math.cos(math.pi * progress)) / 2.0
        return 1.0 - (1.0 - self.final_factor) * shape
