"""The hashing trick: ids share rows by a hash.

Reference: Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009, arXiv:0902.2206.

Differs from the paper: rows carry no sign, as usual for embeddings.

Shapes: N ids, B batch, F features, D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.bags import Bags
from recemb.method import UNBOUNDED, CompressedTables, full_table_variance
from recemb.stacked import (
    HashedRows,
    features_of_ids,
    first_rows,
    forward_linear,
    per_feature,
    proportional_range,
    proportional_rows,
    seed_with_means,
    stacked_table,
    start_variance,
)


class Hashing(CompressedTables):
    """Gives id ``i`` of table ``t`` row ``hash_t(i)``; ids on one row are one id to the model.

    Memory: ``num_embeddings * embedding_dim * 4`` bytes. A table gets rows in proportion to its own, and stays full
    where that is all of them.

    Args:
        tables: the logical tables; ids may be unbounded 64-bit hashes.
        num_embeddings: rows in all; what a byte budget turns.
        hash_function: ``"universal"`` or ``"modulo"``. The remainder is what most comparisons call hashing; with ids in
            order of frequency it also keeps the most frequent ids of a table apart from each other, which a universal
            hash does not. With ids in any other meaningful order take the universal one.
        shared: all tables share all rows, so that ids of different features collide as well. The universal hash is
            salted by table; the remainder is that of the id counted through all tables.
        seed: changes every universal hash at once.

    Raises:
        ValueError: fewer than one row, an unknown hash function.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> Hashing(tables, num_embeddings=1000)
        Hashing(...)
    """

    budget_knob: ClassVar[str | None] = "num_embeddings"
    supports_unbounded: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_embeddings: int,
        hash_function: str = "universal",
        shared: bool = False,
        seed: int = 0,
    ) -> None:
        rows = proportional_rows(tables, num_embeddings)
        is_full = [not shared and count == table.num_embeddings for count, table in zip(rows, tables, strict=True)]
        ranges, variances = rows, [start_variance(table) for table in tables]
        if shared:
            ranges, variances = [num_embeddings], [full_table_variance(tables)]
        super().__init__(tables, [[stacked_table("hashing", ranges, tables[0].embedding_dim, variances)]])
        self._rows = HashedRows(
            tables,
            [count if full else 0 for count, full in zip(rows, is_full, strict=True)],
            [num_embeddings if shared else 0 if full else count for count, full in zip(rows, is_full, strict=True)],
            hash_function=hash_function,
            seed=seed,
            shared=shared,
        )
        self._wraps_at = num_embeddings if shared and hash_function == "modulo" else None
        # Ids counted through all tables; a table without a last id adds nothing.
        sizes = [0 if table.num_embeddings == UNBOUNDED else table.num_embeddings for table in tables]
        self._shifts: Tensor
        self.register_buffer(
            "_shifts", per_feature(tables, [start % num_embeddings for start in first_rows(sizes)]), persistent=False
        )

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        rows = self._rows(bags.ids, features_of_ids(bags))
        return [[rows if self._wraps_at is None else _shift_(rows, bags.per_id(self._shifts), self._wraps_at)]]

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        return rows[0][0]

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return forward_linear(self, Bags.of(features), self._is_mean)

    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every bounded table: exactly where it stays full, else a row starts at the mean of its ids' rows."""

        def rows_of(feature: int, ids: Tensor, lookup: int) -> Tensor:
            rows = self._rows.of_feature(feature, ids, lookup)
            return rows if self._wraps_at is None else _shift_(rows, self._shifts[feature], self._wraps_at)

        weight = self.get_parameter("lookups.0.embedding_bags.hashing.weight")
        return seed_with_means(weight, self.tables, full_tables, rows_of)

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        return proportional_range(tables)


def _shift_(rows: Tensor, shifts: Tensor, modulus: int) -> Tensor:
    """(i + shift) mod m, in place, from i mod m and shift mod m: unbounded ids plus a shift would overflow."""
    rows += shifts
    return rows.sub_(modulus * (rows >= modulus))
