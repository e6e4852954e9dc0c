"""Hash embeddings: several hashed rows, weighted by trainable importances.

Reference: Svenstrup et al., "Hash Embeddings for Efficient Word Representations", NeurIPS 2017, arXiv:1709.03933.

Differs from the paper: rows are hashed from the id itself, not from the hash that finds its weights, so two ids that
share weights still differ in their rows; weights start at 1 and rows so that vectors have a full table's variance.

Shapes: N ids, B batch, F features, D embedding_dim, k lookups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.method import CompressedTables, full_table_variance, physical_table, uniform_bound
from recemb.packed import PackedNumbers
from recemb.products import weighted_sum
from recemb.stacked import HashedRows, features_of_ids, proportional_range, proportional_rows, seed_with_means


class HashEmbeddings(CompressedTables):
    """Gives id ``i`` of table ``t`` the sum over j < k of ``weight_t(i)[j]`` times row ``hash(t, j, i)`` of a pool.

    The weights let an id turn down a row it shares with a more frequent one.

    Memory: ``num_embeddings`` rows of ``embedding_dim`` values, shared by all tables, and ``weights_per_row`` sets of k
    weights a row (at most one an id), 4k bytes each for k of 1, 2, 4 or a multiple of 4; padded to that else.

    Args:
        tables: the logical tables; ids may be unbounded 64-bit hashes.
        num_embeddings: rows of the pool; what a byte budget turns.
        num_lookups: k, at least 1; the paper takes 2 and finds more of no use.
        weights_per_row: sets of weights for each row of the pool, shared out in proportion to the tables' rows. A table
            with fewer ids than its share has one set an id, another hashes its ids to them.
        seed: changes every hash at once.

    Raises:
        ValueError: rows, lookups or weights_per_row below 1.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> HashEmbeddings(tables, num_embeddings=1000)
        HashEmbeddings(...)
    """

    budget_knob: ClassVar[str | None] = "num_embeddings"
    supports_unbounded: ClassVar[bool] = True
    merges_ids: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_embeddings: int,
        num_lookups: int = 2,
        weights_per_row: int = 10,
        seed: int = 0,
    ) -> None:
        if min(num_embeddings, num_lookups, weights_per_row) < 1:
            raise ValueError(
                "num_embeddings, num_lookups and weights_per_row must be at least 1, "
                f"got {num_embeddings}, {num_lookups} and {weights_per_row}"
            )
        bound = uniform_bound(full_table_variance(tables) / num_lookups)
        sets = proportional_rows(tables, num_embeddings * weights_per_row)
        has_own = [count == table.num_embeddings for table, count in zip(tables, sets, strict=True)]
        weights = PackedNumbers(tables, sets, [1.0] * num_lookups)
        pool = physical_table("hash_embeddings_pool", num_embeddings, tables[0].embedding_dim, bound)
        super().__init__(tables, [[pool], [weights.table("hash_embeddings_weights")]])
        self._num_lookups = num_lookups
        self._weights = weights
        self._rows = HashedRows(
            tables, [0] * len(sets), [num_embeddings] * len(sets), num_lookups=num_lookups, seed=seed, shared=True
        )
        # The hash after those of the rows. Positions count from 0 in every table.
        self._positions = HashedRows(
            tables,
            [count if own else 0 for count, own in zip(sets, has_own, strict=True)],
            [0 if own else count for count, own in zip(sets, has_own, strict=True)],
            first_lookup=num_lookups,
            seed=seed,
            shared=True,
        )

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        """(k * N,) slots in the pool, lookup after lookup, and (N,) rows of weights."""
        return self._slots(bags, self._positions_of(bags))

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        return self._weigh(rows[0][0], self._weights.numbers(rows[1][0], self._positions_of(bags)))

    def embed_each(self, bags: Bags) -> Tensor:
        # The positions are hashed once for both ends.
        positions = self._positions_of(bags)
        slots = self._slots(bags, positions)
        rows, weights = (self.lookup_rows(index, group)[0] for index, group in enumerate(slots))
        return self._weigh(rows, self._weights.numbers(weights, positions))

    def _positions_of(self, bags: Bags) -> Tensor:
        return self._positions(bags.ids, features_of_ids(bags))

    def _slots(self, bags: Bags, positions: Tensor) -> list[list[Tensor]]:
        features = features_of_ids(bags)
        rows = torch.stack([self._rows(bags.ids, features, lookup) for lookup in range(self._num_lookups)])
        return [[rows.view(-1)], [self._weights.slots(positions, features)]]

    def _weigh(self, rows_KND: Tensor, weights_Nk: Tensor) -> Tensor:
        return weighted_sum(rows_KND.view(self._num_lookups, weights_Nk.shape[0], rows_KND.shape[1]), weights_Nk)

    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every bounded table, approximately: as the average of the means of its k rows, with weights as they start."""
        weight = self.get_parameter("lookups.0.embedding_bags.hash_embeddings_pool.weight")
        return seed_with_means(weight, self.tables, full_tables, self._rows.of_feature, num_lookups=self._num_lookups)

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        return proportional_range(tables)
