"""Plain magnitude pruning: train full tables, keep the largest values. The control of every search.

References: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression",
arXiv:1710.01878; Frankle and Carbin, "The Lottery Ticket Hypothesis", arXiv:1803.03635, for training what is left again
from the values it began with (``RetrainStage``, ``reset: rewind``). Tables as they were pruned stay where they validate
better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.bags import Bags
from recemb.magnitude import magnitude_plan
from recemb.method import CompressedTables
from recemb.plan import CompressionPlan
from recemb.stacked import first_rows, forward_linear, per_feature, seed_full_tables, stacked_table, start_variance


class Magnitude(CompressedTables):
    """Gives every id a row of its own; the plan keeps what is largest, over all tables alike.

    Memory: full tables while they train; the plan's after that.

    Args:
        tables: the logical tables.
        unit: what is kept or dropped: single ``"values"``, by their size, which leaves sparse rows; or whole
            ``"rows"``, by their L2 norm, which leaves dense ones.

    Raises:
        ValueError: another unit.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=100, embedding_dim=8, feature_names=["ad"])]
        >>> Magnitude(tables)
        Magnitude(...)
    """

    searches: ClassVar[bool] = True

    def __init__(self, tables: Sequence[EmbeddingBagConfig], *, unit: Literal["values", "rows"] = "values") -> None:
        if unit not in ("values", "rows"):
            raise ValueError(f"unit must be 'values' or 'rows', got {unit!r}")
        rows = [table.num_embeddings for table in tables]
        width = tables[0].embedding_dim
        stack = stacked_table("magnitude", rows, width, [start_variance(table) for table in tables])
        super().__init__(tables, [[stack]])
        self._unit = unit
        self.starts: Tensor
        self.register_buffer("starts", per_feature(tables, first_rows(rows)))

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        return [[(bags.ids + bags.per_id(self.starts)).view(-1)]]

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        return rows[0][0]

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return forward_linear(self, Bags.of(features), self._is_mean)

    def derive_plan(self, budget_bytes: int | None) -> CompressionPlan:
        """The largest values, or rows, that fit.

        Raises:
            ValueError: no budget, without which nothing would be dropped; or one that no table at all would meet.
        """
        if budget_bytes is None:
            raise ValueError("magnitude pruning has no size of its own: give embedding.budget (such as 10x)")
        rows = self.stored_tables()
        if self._unit == "rows":
            # A row of which every value has the row's norm is kept or dropped as one.
            rows = {name: row.norm(dim=1, keepdim=True).expand(row.shape) for name, row in rows.items()}
        return magnitude_plan(rows, budget_bytes, source=f"magnitude of {self._unit}")

    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every table, exactly."""
        weight = self.get_parameter("lookups.0.embedding_bags.magnitude.weight")
        starts = first_rows([table.num_embeddings for table in self.tables])
        return seed_full_tables([(weight, starts)], self.tables, [True] * len(self.tables), full_tables)
