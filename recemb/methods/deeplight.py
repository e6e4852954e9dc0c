"""DeepLight: magnitude pruning while the tables train, a little more of them every few steps.

Reference: Deng et al., "DeepLight: Deep Lightweight Feature Interactions for Accelerating CTR Predictions in Ad
Serving", WSDM 2021, arXiv:2002.06987.

Differs from the paper:

* Tables alone are pruned; the paper also prunes the dense layers and the field weights of its own model.
* The share to drop follows ``1 - 0.001 ** (step / steps_to_target)``. The paper's ``1 - 0.99 ** (step / 100)`` is the
  same at ``steps_to_target=68_732``, which is longer than an epoch of most logs.
* The threshold is exact, where the released code bisects for it; and one for all tables, as there.
* With a byte budget the share is that of the sparse tables it pays for, looked at anew halfway and near the end,
  because how many values fit depends on how they spread over rows.

Shapes: n rows of all tables, D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.magnitude import magnitude_plan
from recemb.magnitude_threshold import kth_magnitude
from recemb.methods.magnitude import Magnitude
from recemb.plan import CompressionPlan

# Of the way to the target that is left at ``steps_to_target``.
_REST = 1e-3
# Shares of what is to be dropped at which the number of values that a budget pays for is looked at: each look takes as
# long as the plan in the end.
_LOOKS = (0.0, 0.5, 0.9)


class DeepLight(Magnitude):
    """Full tables of which the smallest values become zero every few steps; what is zero may grow again until then.

    Validations count from ``steps_to_target`` on: a table that is not pruned yet is better. Works inside fused kernels
    and over ranks; optimizer state stays.

    Memory: full tables while they train; the plan's after that.

    Args:
        tables: the logical tables.
        kept_fraction: share of all values that are left; None: what ``embedding.budget`` pays for.
        steps_to_target: steps after which 99.9% of what is to be dropped has been, or their share of all steps of the
            training (a float, at most 1.0): the rest of it heals.
        every_steps: steps between two prunings.

    Raises:
        ValueError: a share outside (0, 1], or counts below 1.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=100, embedding_dim=8, feature_names=["ad"])]
        >>> DeepLight(tables, kept_fraction=0.1)
        DeepLight(...)
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        kept_fraction: float | None = None,
        steps_to_target: int | float = 0.5,
        every_steps: int = 10,
    ) -> None:
        if kept_fraction is not None and not 0 < kept_fraction <= 1:
            raise ValueError(f"kept_fraction must be in (0, 1], got {kept_fraction}")
        if not (0 < steps_to_target <= 1 if isinstance(steps_to_target, float) else steps_to_target >= 1):
            raise ValueError(f"steps_to_target must be steps or a share in (0, 1], got {steps_to_target}")
        if every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {every_steps}")
        super().__init__(tables)
        self._total = sum(table.num_embeddings * table.embedding_dim for table in tables)
        self._kept_fraction = kept_fraction
        self._steps_to_target = steps_to_target
        self._every_steps = every_steps
        self._budget_bytes: int | None = None
        self._total_steps: int | None = None
        self._last_step = 0
        # (values to keep in the end, times that this was looked at); saved, so that a run can go on.
        self.target: Tensor
        kept = 0 if kept_fraction is None else max(round(kept_fraction * self._total), 1)
        self.register_buffer("target", torch.tensor([kept, 0]))

    def begin_training(self, total_steps: int, budget_bytes: int | None) -> None:
        """How long the way is, and the budget that decides how much is dropped.

        Raises:
            ValueError: neither a budget nor ``kept_fraction``, or both.
        """
        if (self._kept_fraction is None) == (budget_bytes is None):
            raise ValueError(
                "DeepLight: give embedding.budget (such as 10x) or method.kept_fraction; got "
                f"{budget_bytes} bytes and {self._kept_fraction}"
            )
        self._budget_bytes = budget_bytes
        self._total_steps = total_steps

    def progress(self, step: int) -> float:
        """Share of what is to be dropped in the end that is after ``step``, in [0, 1)."""
        target = self._steps_to_target
        if isinstance(target, float):
            if self._total_steps is None:
                raise ValueError(
                    f"steps_to_target={target} is a share of a training: call begin_training before it, or give steps"
                )
            target *= self._total_steps
        return float(1 - _REST ** (step / target))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Make the smallest values zero, every ``every_steps``.

        Raises:
            ValueError: it was never told how long the training is, or what budget there is.
        """
        self._last_step = step
        if step % self._every_steps:
            return
        progress = self.progress(step)
        num_kept, looks = self.target.tolist()
        if self._kept_fraction is None and looks < len(_LOOKS) and progress >= _LOOKS[looks]:
            num_kept = self.derive_plan(self._budget_bytes).num_values()
            self.target.copy_(torch.tensor([num_kept, sum(progress >= look for look in _LOOKS)]))
        num_dropped = int(progress * (self._total - num_kept))
        if num_dropped == 0:
            return
        pieces, over_ranks = self._pieces()
        threshold = kth_magnitude(pieces, num_dropped, over_ranks=over_ranks)
        for piece in pieces:
            piece.masked_fill_(piece.abs() <= threshold, 0.0)

    @property
    def settled(self) -> bool:
        """From ``steps_to_target`` on, as in the released code."""
        return self.progress(self._last_step) >= 1 - _REST - 1e-9

    def search_figures(self) -> dict[str, float]:
        pieces, over_ranks = self._pieces()
        if over_ranks:
            return {}
        return {"kept_values": sum(int(torch.count_nonzero(piece)) for piece in pieces)}

    def derive_plan(self, budget_bytes: int | None) -> CompressionPlan:
        """The largest values that fit; without a budget, ``kept_fraction`` of all.

        Raises:
            ValueError: neither, or a budget that no table at all would meet.
        """
        if budget_bytes is not None:
            return magnitude_plan(self.stored_tables(), budget_bytes, source="DeepLight")
        if self._kept_fraction is None:
            raise ValueError("DeepLight: give embedding.budget (such as 10x) or method.kept_fraction; got neither")
        rows = self.stored_tables()
        num_dropped = self._total - int(self.target[0])
        threshold = kth_magnitude(list(rows.values()), num_dropped) if num_dropped else -1.0
        left = {name: part.masked_fill(part.abs() <= threshold, 0.0) for name, part in rows.items()}
        return magnitude_plan(left, None, source="DeepLight")

    def _pieces(self) -> tuple[list[Tensor], bool]:
        """The rows that this rank holds, to be written to, and whether other ranks hold others."""
        weight = self.lookups[0].state_dict()["embedding_bags.magnitude.weight"]
        if isinstance(weight, ShardedTensor):
            return [shard.tensor.detach() for shard in weight.local_shards()], True
        return [weight.detach()], False
