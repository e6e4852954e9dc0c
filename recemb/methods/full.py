"""Uncompressed tables: the reference every method is measured against.

Reference: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
arXiv:1906.00091.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.bags import Bags
from recemb.method import CompressedTables


class Full(CompressedTables):
    """Gives every id a row of its own.

    Memory: ``sum(num_embeddings * embedding_dim) * 4`` bytes.

    Args:
        tables: the logical tables; they become the physical ones, names and pooling included. A table that is alone
            is read under one key, whatever the number of its features: on CPU kernels take half the time then.

    Raises:
        ValueError: no finite number of rows (unbounded ids), from the collection.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> Full([EmbeddingBagConfig(name="t_ad", num_embeddings=10, embedding_dim=4, feature_names=["ad"])])
        Full(...)
    """

    one_width: ClassVar[bool] = False
    stacks_tables: ClassVar[bool] = False

    def __init__(self, tables: Sequence[EmbeddingBagConfig]) -> None:
        # One kernel call per pooling mode; almost always one in all.
        self._poolings = sorted({table.pooling for table in tables}, key=lambda pooling: pooling.value)
        lookups = [[table for table in tables if table.pooling == pooling] for pooling in self._poolings]
        if len(tables) == 1:
            lookups = [[dataclasses.replace(tables[0], feature_names=tables[0].feature_names[:1])]]
        super().__init__(tables, lookups)

    def expect_weights(self) -> None:
        for index in range(len(self.lookups)):
            self.collection(index)._is_weighted = True

    @torch.no_grad()
    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every table, exactly."""
        for index in range(len(self.lookups)):
            for config in self.physical_tables[index]:
                weight = self.get_parameter(f"lookups.{index}.embedding_bags.{config.name}.weight")
                weight.copy_(full_tables[config.name])
        return [table.name for table in self.tables]

    def stored_tables(self) -> dict[str, Tensor]:
        return {
            config.name: self.get_parameter(f"lookups.{index}.embedding_bags.{config.name}.weight").detach().clone()
            for index in range(len(self.lookups))
            for config in self.physical_tables[index]
        }

    def embed(self, bags: Bags) -> Tensor:
        assert len(self.tables) == 1 and not bags.single
        [vectors_ND] = self.lookup_rows(0, [bags.ids])
        return vectors_ND

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        if len(self.tables) == 1 and len(self.feature_names) > 1:
            return self._forward_one_table(features)
        if len(self.lookups) == 1:
            return self.read(0, features)
        vectors: dict[tuple[str, str], Tensor] = {}
        for index in range(len(self.lookups)):
            values = self.read(index, features)
            slots = [
                (config.name, name, config.embedding_dim)
                for config in self.physical_tables[index]
                for name in config.feature_names
            ]
            for (table, name, _), part in zip(slots, values.split([dim for *_, dim in slots], dim=1), strict=True):
                vectors[table, name] = part
        return torch.cat([vectors[table.name, name] for table in self.tables for name in table.feature_names], dim=1)

    def _forward_one_table(self, features: KeyedJaggedTensor) -> Tensor:
        """The bags of all features go under the one key, and their sums side by side again: (B, F * D)."""
        num_features, batch_size = len(self.feature_names), features.stride()
        bags = KeyedJaggedTensor(
            keys=self.physical_tables[0][0].feature_names,
            values=features.values(),
            weights=features.weights_or_none(),
            lengths=features.lengths(),
            offsets=features.offsets(),
            stride=num_features * batch_size,
        )
        return self.read(0, bags).view(num_features, batch_size, -1).transpose(0, 1).reshape(batch_size, -1)
