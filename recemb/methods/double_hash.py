"""Frequency-based double hashing: frequent ids keep rows of their own, the others are the sum of two hashed rows.

Reference: Zhang et al., "Model Size Reduction Using Frequency Based Double Hashing for Recommender Systems",
RecSys 2020, arXiv:2007.14523.

Differs from the paper: ids are in order of frequency already, so telling the frequent ones is a comparison and needs no
table of ids; both hashes of an id fall into one range of rows.

Shapes: N ids, B batch, F features, D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.bags import Bags
from recemb.method import CompressedTables
from recemb.stacked import (
    HashedRows,
    at_features,
    bag_offsets,
    features_of_ids,
    per_feature,
    proportional_range,
    proportional_rows,
    seed_with_means,
    stacked_table,
    start_variance,
)


class DoubleHash(CompressedTables):
    """Gives a frequent id its own row, and any other the sum of rows ``hash_0(i)`` and ``hash_1(i)`` of its table.

    Two ids are confused only if both their rows collide: M shared rows tell about M * M / 2 ids apart.

    Memory: ``num_embeddings * embedding_dim * 4`` bytes; no map, because ids are in order of frequency (id 0 stands for
    values out of the vocabulary). A table that would not shrink stays full.

    Args:
        tables: the logical tables, ids in descending order of frequency.
        num_embeddings: rows in all, shared out in proportion to the tables' own; what a byte budget turns.
        own_fraction: share of a table's rows that belong to one frequent id each, in [0, 1). The more skewed the ids,
            the more: half is a fair start, 0 is plain double hashing.
        seed: changes every hash at once.

    Raises:
        ValueError: fewer than one row, a fraction outside [0, 1).

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> DoubleHash(tables, num_embeddings=1000)
        DoubleHash(...)
    """

    budget_knob: ClassVar[str | None] = "num_embeddings"
    merges_ids: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_embeddings: int,
        own_fraction: float = 0.5,
        seed: int = 0,
    ) -> None:
        if not 0 <= own_fraction < 1:
            raise ValueError(f"own_fraction must be in [0, 1), got {own_fraction}")
        own, hashed, ranges, variances = [], [], [], []
        for table, rows in zip(tables, proportional_rows(tables, num_embeddings), strict=True):
            own.append(rows if rows == table.num_embeddings else int(rows * own_fraction))
            hashed.append(rows - own[-1])
            ranges += [own[-1], hashed[-1]]
            # A sum of two rows has the variance of both.
            variances += [start_variance(table), start_variance(table) / 2]
        super().__init__(tables, [[stacked_table("double_hash", ranges, tables[0].embedding_dim, variances)]])
        self._rows = HashedRows(tables, own, hashed, num_lookups=2, seed=seed)
        self._own_rows = own
        self._own: Tensor
        self.register_buffer("_own", per_feature(tables, own), persistent=False)

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        """Rows of all ids one after another, one or two of them an id: see ``rows_per_id``."""
        features = features_of_ids(bags)
        both = torch.stack([self._rows(bags.ids, features, lookup) for lookup in (0, 1)], dim=-1)
        needed = torch.ones_like(both, dtype=torch.bool)
        needed[..., 1] = self._is_hashed(bags)
        return [[both[needed]]]

    def rows_per_id(self, bags: Bags) -> Tensor:
        """(N,) int64: 1 for ids with a row of their own, 2 for hashed ones."""
        return self._is_hashed(bags).view(-1) + 1

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        """The kernel has summed an id's rows already."""
        return rows[0][0]

    def embed_each(self, bags: Bags) -> Tensor:
        if bags.ids.numel() == 0:
            return self.compose([self.lookup_rows(0, [bags.ids.view(-1)])], bags)
        [slots] = self.remap(bags)
        vectors = self.lookup_bags(0, slots, bag_offsets(self.rows_per_id(bags)), bags.ids.numel())
        return self.compose([[vectors]], bags)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        bags = Bags.of(features)
        if bags.single or bags.weights is not None:
            return bags.pool(self.embed(bags), self._is_mean)
        # Sums commute with sums over a bag: one bag of all rows of its ids.
        [slots] = self.remap(bags)
        offsets = bag_offsets(self.rows_per_id(bags)).index_select(0, bags.offsets())
        return bags.lay_out(self.lookup_bags(0, slots, offsets, bags.lengths.numel()), self._is_mean)

    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every table: exactly for ids with rows of their own, else as the average of the means of its two rows."""
        weight = self.get_parameter("lookups.0.embedding_bags.double_hash.weight")
        return seed_with_means(
            weight, self.tables, full_tables, self._rows.of_feature, num_lookups=2, own=self._own_rows
        )

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        return proportional_range(tables)

    def _is_hashed(self, bags: Bags) -> Tensor:
        return bags.ids >= at_features(self._own, features_of_ids(bags))
