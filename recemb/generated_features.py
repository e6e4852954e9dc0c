"""Feature generation: each of an id's k rows is a feature of its own to the model.

Reference: Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation
Systems", KDD 2020, arXiv:1909.02107, section 4.

A compression method keeps the model's features as they are; this changes them. A concatenation of k rows of width
``embedding_dim / k`` is one vector to a dot interaction, while k generated features of width ``embedding_dim`` take
part in it one by one. So this is no option of ``Complementary``, but a collection that names k features for one.

Shapes: B batch, D embedding_dim, k num_partitions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recemb.collection import CompressedEmbeddingBagCollection
from recemb.methods.complementary import Complementary
from recemb.methods.full import Full
from recemb.partitions import choose_partitions


class GeneratedFeatures(nn.Module):
    """Called like TorchRec's EmbeddingBagCollection; feature ``ad`` comes out as ``ad__0``, ..., ``ad__<k - 1>``.

    ``embedding_bag_configs()`` names the generated features and their tables, so a model built from it (TorchRec's DLRM
    or recemb's) has the right number of features.

    Memory: a row of D values for each class of each partition. A table that would not shrink stays full and keeps its
    one feature, as does one below ``full_below_rows``.

    Args:
        tables: the logical tables, all of one ``embedding_dim``.
        num_collisions: as for ``Complementary``; no budget turns it.
        family: as for ``Complementary``.
        num_partitions: k.
        full_below_rows: tables of fewer rows stay full.
        check_ids: raise on ids outside [0, num_embeddings).

    Raises:
        ValueError: as ``CompressedEmbeddingBagCollection`` and ``Complementary``; several widths.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> collection = GeneratedFeatures(tables, num_collisions=4)
        >>> collection(KeyedJaggedTensor(["ad"], torch.tensor([7, 8]), lengths=torch.tensor([1, 1]))).keys()
        ['ad__0', 'ad__1']
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_collisions: int,
        family: str = "remainder_first",
        num_partitions: int = 2,
        full_below_rows: int = 0,
        check_ids: bool = True,
    ) -> None:
        super().__init__()
        if len(widths := sorted({table.embedding_dim for table in tables})) != 1:
            raise ValueError(f"generated features must have one embedding_dim, got tables of {widths}")
        wide, full = [], []
        self._configs: list[EmbeddingBagConfig] = []
        for table in tables:
            sizes = choose_partitions(family, table.num_embeddings, num_collisions, num_partitions).sizes
            if table.num_embeddings < full_below_rows or sum(sizes) >= table.num_embeddings:
                full.append(table)
                self._configs.append(table)
                continue
            wide.append(dataclasses.replace(table, embedding_dim=num_partitions * table.embedding_dim))
            self._configs += [_generated(table, number, size) for number, size in enumerate(sizes)]
        method = functools.partial(
            Complementary,
            num_collisions=num_collisions,
            family=family,
            num_partitions=num_partitions,
            operation="concat",
        )
        self.collections = nn.ModuleList(
            CompressedEmbeddingBagCollection(group, which, check_ids=check_ids)
            for group, which in ((wide, method), (full, Full))
            if group
        )
        self._keys = [name for config in self._configs for name in config.feature_names]
        # Columns as they come: k of each feature of a partitioned table in turn, then the full ones.
        self._columns = [
            f"{name}__{j}" for table in wide for name in table.feature_names for j in range(num_partitions)
        ]
        self._columns += [name for table in full for name in table.feature_names]
        self._width = widths[0]

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """A table for each partition of each compressed table, named ``<table>__<partition>``; full tables as given."""
        return self._configs

    def is_weighted(self) -> bool:
        """Weights are not supported."""
        return False

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled rows, keyed by generated feature: values (B, D times the number of features) float32.

        Args:
            features: ids under the keys of the logical tables.
        """
        outputs = [collection(features).values() for collection in self.collections]
        values = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        if self._columns != self._keys:
            parts: dict[str, Tensor] = dict(zip(self._columns, values.split(self._width, dim=1), strict=True))
            values = torch.cat([parts[key] for key in self._keys], dim=1)
        return KeyedTensor(self._keys, [self._width] * len(self._keys), values)


def _generated(table: EmbeddingBagConfig, number: int, num_classes: int) -> EmbeddingBagConfig:
    return dataclasses.replace(
        table,
        name=f"{table.name}__{number}",
        num_embeddings=num_classes,
        feature_names=[f"{name}__{number}" for name in table.feature_names],
    )
