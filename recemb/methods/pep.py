"""PEP: values below a threshold that is learnt with them read as zero, and the others are drawn towards it.

Reference: Liu et al., "Learnable Embedding Sizes for Recommender Systems", ICLR 2021, arXiv:2101.07577.

A search in stages: rows and thresholds are trained together; the values that are left over, or the largest of them to
a budget, are kept; they are trained again from the values they began with (a lottery ticket), and stay as they were
pruned where that validates better (``recemb.training.stages.RetrainStage``).

Differs from the paper and its released code:

* The released code starts thresholds at sigmoid(-150), which is 0 in float32 with gradient 0: only the coupled weight
  decay of Adam moves them, all alike, about 1e-3 a step. Here sigmoid(s) starts at a small share of the rows' own
  standard deviation: the gradient of s is sigmoid(s) times that of the row (nearly), so a threshold starts with a
  hundredth of a row's gradient, and drops next to nothing before it has learnt anything.
* Thresholds are trained by Adagrad, each by the scale of its own gradients, with an eps below the smallest of them;
  the usual 1e-8 would stop them.
* The code trains rows by Adam with coupled weight decay of all rows in every step: ``optimizer=dense_adam``, 16 to 400
  times slower than a fused optimizer. Thresholds keep theirs.
* What pushes thresholds up is the decay of s towards 0, per sample, of the ids of the batch only (the released code
  decays all thresholds in every step).
* The search ends with its steps, and the budget picks the largest of what is left; the released code saves a table
  each time the number of values falls below one that was asked for.

Shapes: N ids, D embedding_dim, n rows of a table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.magnitude import magnitude_plan
from recemb.method import CompressedTables, full_table_variance, physical_table
from recemb.optimizers import EmbeddingOptimizer
from recemb.plan import CompressionPlan
from recemb.stacked import first_rows, per_feature, seed_full_tables, stacked_table, start_variance
from recemb.table_rows import read_stack

GRANULARITIES = ("model", "column", "row", "value")
# Gradients of fresh thresholds are those of rows (1e-6 or so in large batches) times sigmoid(s) (1e-5 or so).
_EPS = 1e-16
# Thresholds a row of their table where each row has one: fused kernels take four values at least.
_PACKED = 4


class Pep(CompressedTables):
    """Gives id ``i`` the vector ``sign(E[i]) * max(|E[i]| - sigmoid(s), 0)``.

    Memory: full tables and their thresholds (as much again for one a value); what is saved is saved by the plan.

    Args:
        tables: the logical tables.
        per: what has a threshold s of its own: the ``"model"``, each ``"column"``, ``"row"`` or ``"value"`` of the
            paper's global, dimension-wise, feature-wise and feature-dimension-wise settings. The paper finds the last
            best; the last two lie in a second physical table beside the rows.
        start_fraction: sigmoid(s) to start with, as a fraction of the standard deviation of a table's rows.
        learning_rate: of thresholds, by Adagrad: an id that comes t times moves its own by up to
            ``2 * learning_rate * sqrt(t)``, and has some 5 to go from the start to where values are dropped. 1 where
            frequent ids come some hundred times in a search, 0.1 where they come some ten thousand times.
        decay: lambda of ``lambda / 2 * s ** 2`` in the loss of a sample, for every id in it: how hard thresholds push
            up. Where gradients of a sample's vectors are about g, they come to rest at about ``decay * |s| / g``.

    Raises:
        ValueError: an unknown ``per``, a fraction outside (0, 1), a negative rate or decay.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**5, embedding_dim=16, feature_names=["ad"])]
        >>> Pep(tables, per="row")
        Pep(...)
    """

    searches: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        per: Literal["model", "column", "row", "value"] = "value",
        start_fraction: float = 0.01,
        learning_rate: float = 0.1,
        decay: float = 1e-5,
    ) -> None:
        if per not in GRANULARITIES:
            raise ValueError(f"per must be one of {GRANULARITIES}, got {per!r}")
        if not 0 < start_fraction < 1:
            raise ValueError(f"start_fraction must be in (0, 1), got {start_fraction}")
        for name, value in (("learning_rate", learning_rate), ("decay", decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        width = tables[0].embedding_dim
        sizes = [table.num_embeddings for table in tables]
        lookups = [[stacked_table("pep_rows", sizes, width, [start_variance(table) for table in tables])]]
        each = width if per == "value" else 1
        starts = [
            (size * each, _logit(start_fraction * math.sqrt(start_variance(table))))
            for size, table in zip(sizes, tables, strict=True)
        ]
        if per == "value":
            lookups.append([physical_table("pep_thresholds", sum(sizes), width, functools.partial(_fill, starts))])
        elif per == "row":
            rows = -(-sum(sizes) // _PACKED)
            lookups.append([physical_table("pep_thresholds", rows, _PACKED, functools.partial(_fill, starts))])
        super().__init__(tables, lookups)
        self._per, self._learning_rate, self._decay = per, learning_rate, decay
        self.thresholds: nn.Parameter | None = None
        if len(lookups) > 1:
            self.lookup_optimizers[1] = EmbeddingOptimizer("adagrad", learning_rate, _EPS)
        else:
            start = _logit(start_fraction * math.sqrt(full_table_variance(tables)))
            self.thresholds = nn.Parameter(torch.full((width if per == "column" else 1,), start))
        self.starts: Tensor
        self.register_buffer("starts", per_feature(tables, first_rows(sizes)))

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        rows = bags.ids + bags.per_id(self.starts)
        if self._per == "value":
            return [[rows], [rows]]
        return [[rows], [rows >> 2]] if self._per == "row" else [[rows]]

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        [[numbers], *_] = self.remap(bags)
        thresholds = self._thresholds_of(numbers.view(-1), rows[1][0] if len(rows) > 1 else None)
        if self.thresholds is None and thresholds.requires_grad and self.training:
            pressure = self._decay / bags.batch_size * thresholds.detach()
            thresholds.register_hook(lambda gradient: gradient + pressure)
        return soft_threshold(rows[0][0], thresholds)

    def _thresholds_of(self, rows: Tensor, looked_up: Tensor | None) -> Tensor:
        """s of (N,) rows: (N, D), (N, 1), (D,) or (1,)."""
        if looked_up is None:
            assert self.thresholds is not None
            return self.thresholds
        return looked_up if self._per == "value" else looked_up.gather(1, (rows & (_PACKED - 1)).unsqueeze(1))

    def penalty(self) -> Tensor | None:
        """Half of ``decay`` times the squares of s, where these are few; others are decayed as they are looked up."""
        return None if self.thresholds is None else self._decay / 2 * self.thresholds.square().sum()

    def architecture_parameters(self) -> list[nn.Parameter]:
        return [] if self.thresholds is None else [self.thresholds]

    def architecture_optimizer(self) -> torch.optim.Optimizer | None:
        """Adagrad of the model's or the columns' thresholds; those of rows and values are trained by the kernels."""
        if self.thresholds is None:
            return None
        return torch.optim.Adagrad([self.thresholds], lr=self._learning_rate, eps=_EPS)

    @torch.no_grad()
    def folded_tables(self) -> dict[str, Tensor]:
        """Table name -> (num_embeddings, D) vectors of all ids. Over ranks all of them must call it."""
        sizes = [table.num_embeddings for table in self.tables]
        values = read_stack(self, 0, sum(sizes))
        thresholds: Tensor
        if self.thresholds is not None:
            thresholds = self.thresholds
        else:
            stored = read_stack(self, 1, -(-sum(sizes) // (1 if self._per == "value" else _PACKED)))
            thresholds = stored if self._per == "value" else stored.view(-1, 1)[: sum(sizes)]
        parts = soft_threshold(values, thresholds).split(sizes)
        return {table.name: part for table, part in zip(self.tables, parts, strict=True)}

    def search_figures(self) -> dict[str, float]:
        """Values above their thresholds, of all tables, and their mean number a row."""
        kept = sum(int(part.count_nonzero()) for part in self.folded_tables().values())
        return {"kept_values": kept, "mean_dim": kept / sum(table.num_embeddings for table in self.tables)}

    def derive_plan(self, budget_bytes: int | None) -> CompressionPlan:
        """What is above its threshold; with a budget, the values that are so by most.

        Raises:
            ValueError: a budget that no table at all would meet.
        """
        return magnitude_plan(self.folded_tables(), budget_bytes, source="pep")

    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every table; vectors are what thresholds leave of it."""
        weight = self.get_parameter("lookups.0.embedding_bags.pep_rows.weight")
        starts = first_rows([table.num_embeddings for table in self.tables])
        return seed_full_tables([(weight, starts)], self.tables, [True] * len(self.tables), full_tables)


def soft_threshold(values: Tensor, thresholds: Tensor) -> Tensor:
    """``sign(v) * max(|v| - sigmoid(s), 0)``, where thresholds s broadcast against values."""
    return values.sign() * torch.relu(values.abs() - torch.sigmoid(thresholds))


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


@torch.no_grad()
def _fill(starts: Sequence[tuple[int, float]], weight: Tensor) -> None:
    """Fill ranges of (count, value) one after the other, and what is left of the last row with 0."""
    flat = weight.view(-1)
    flat.zero_()
    first = 0
    for count, value in starts:
        flat[first : first + count] = value
        first += count
