"""Frequency split: rows of their own for the frequent ids of a table, hashed rows for the rest.

Reference: DeepRec's adaptive embedding, as "AdaptEmb" in Zhang et al., "Experimental Analysis of Large-scale Learnable
Vector Storage Compression", VLDB 2024, arXiv:2311.15578.

Differs from the paper: ids must be in descending order of train frequency, as recemb's data preparation numbers them,
so that the map from id to row is one comparison; the benchmark keeps 4 bytes an id for it and leaves them out of its
sizes. Rare ids are hashed instead of dealt out in turn unless ``hash_function="modulo"``.

Shapes: N ids, F features, D embedding_dim.
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
    features_of_ids,
    forward_linear,
    means_per_row,
    proportional_range,
    proportional_rows,
    stacked_table,
    start_variance,
)


class FrequencySplit(CompressedTables):
    """Gives id ``i`` of table ``t`` row ``i`` where ``i < own_t``, else one of ``hashed_t`` shared rows by its hash.

    Ids are taken to be in descending order of frequency, 0 (out of vocabulary) among the frequent ones.

    Memory: ``num_embeddings * embedding_dim * 4`` bytes, no map. A table gets rows in proportion to its own; it stays
    full where that is all of them.

    Args:
        tables: the logical tables.
        num_embeddings: rows in all; what a byte budget turns.
        own_fraction: share of a table's rows that belong to one id each, in [0, 1). At least one row is shared where
            the table does not stay full. 0 is the hashing trick. The heavier the head of the log, the more: 0.5 is a
            safe start, up to 0.9 at budgets that hold most ids seen often.
        hash_function: ``"universal"``, or ``"modulo"``, which spreads rare ids of like frequency evenly.
        seed: changes every universal hash at once.

    Raises:
        ValueError: fewer than one row, own_fraction outside [0, 1), an unknown hash function.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> FrequencySplit(tables, num_embeddings=1000)
        FrequencySplit(...)
    """

    budget_knob: ClassVar[str | None] = "num_embeddings"

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_embeddings: int,
        own_fraction: float = 0.5,
        hash_function: str = "modulo",
        seed: int = 0,
    ) -> None:
        if not 0 <= own_fraction < 1:
            raise ValueError(f"own_fraction must be in [0, 1), got {own_fraction}")
        rows = proportional_rows(tables, num_embeddings)
        own = [
            count if count == table.num_embeddings else min(int(count * own_fraction), count - 1)
            for count, table in zip(rows, tables, strict=True)
        ]
        variances = [start_variance(table) for table in tables]
        super().__init__(tables, [[stacked_table("frequency_split", rows, tables[0].embedding_dim, variances)]])
        self._rows = HashedRows(
            tables,
            own,
            [count - single for count, single in zip(rows, own, strict=True)],
            hash_function=hash_function,
            seed=seed,
        )

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        return [[self._rows(bags.ids, features_of_ids(bags))]]

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        return rows[0][0]

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return forward_linear(self, Bags.of(features), self._is_mean)

    @torch.no_grad()
    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every table: rows of one id exactly, shared ones at the mean of their ids' rows."""
        weight = self.get_parameter("lookups.0.embedding_bags.frequency_split.weight")
        slots, values, feature = [], [], 0
        for table in self.tables:
            ids = torch.arange(table.num_embeddings, device=weight.device)
            slots.append(self._rows(ids, torch.full_like(ids, feature)))
            values.append(full_tables[table.name].to(weight.device, torch.float32))
            feature += len(table.feature_names)
        means, has_ids = means_per_row(weight.shape[0], torch.cat(slots), torch.cat(values))
        weight.copy_(torch.where(has_ids.unsqueeze(1), means, weight))
        return [table.name for table in self.tables]

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        return proportional_range(tables)
