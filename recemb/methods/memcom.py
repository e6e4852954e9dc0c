"""MEmCom: hashed rows, told apart by a number an id.

Reference: Pansare et al., "Learning Compressed Embeddings for On-Device Inference", MLSys 2022, arXiv:2203.10135.

Differs from the paper: multipliers start at 1 and rows with the variance of a full table, so that vectors do too.

Shapes: N ids, B batch, F features, D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.method import CompressedTables
from recemb.packed import PackedNumbers, bytes_for
from recemb.products import weighted_sum
from recemb.stacked import (
    FeatureGate,
    HashedRows,
    features_of_ids,
    proportional_range,
    proportional_rows,
    seed_with_means,
    stacked_table,
    start_variance,
)


class Memcom(CompressedTables):
    """Gives id ``i`` the row ``U[hash(i)]`` times its own trainable number ``V[i]``, plus its own ``W[i]`` if wanted.

    Memory: ``num_embeddings`` rows of ``embedding_dim`` values, and 4 bytes an id (8 with bias): the ratio to full
    tables stays below ``embedding_dim`` (half of it with bias). A table that would not shrink stays full.

    Args:
        tables: the logical tables.
        num_embeddings: hashed rows in all, shared out in proportion to the tables' own; what a byte budget turns.
        bias: also add a number an id to every value of its vector.
        hash_function: ``"modulo"`` as in the paper (with ids in order of frequency it keeps frequent ids apart) or
            ``"universal"``.
        seed: changes the universal hash.

    Raises:
        ValueError: fewer than one row, an unknown hash function.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> Memcom(tables, num_embeddings=1000)
        Memcom(...)
    """

    budget_knob: ClassVar[str | None] = "num_embeddings"
    merges_ids: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_embeddings: int,
        bias: bool = False,
        hash_function: str = "modulo",
        seed: int = 0,
    ) -> None:
        width = tables[0].embedding_dim
        start = [1.0, 0.0] if bias else [1.0]
        shares = proportional_rows(tables, num_embeddings)
        self.is_full = [
            rows * width * 4 + bytes_for(table.num_embeddings, len(start)) >= table.num_embeddings * width * 4
            for table, rows in zip(tables, shares, strict=True)
        ]
        own = [table.num_embeddings if full else 0 for table, full in zip(tables, self.is_full, strict=True)]
        hashed = [0 if full else rows for rows, full in zip(shares, self.is_full, strict=True)]
        ranges = [a + b for a, b in zip(own, hashed, strict=True)]
        numbers = PackedNumbers(
            tables, [table.num_embeddings - count for table, count in zip(tables, own, strict=True)], start
        )
        rows_table = stacked_table("memcom_rows", ranges, width, [start_variance(table) for table in tables])
        super().__init__(tables, [[rows_table]] + ([] if all(self.is_full) else [[numbers.table("memcom_numbers")]]))
        self._numbers, self._start = numbers, start
        self._rows = HashedRows(tables, own, hashed, hash_function=hash_function, seed=seed)
        self._is_hashed = FeatureGate(tables, [not full for full in self.is_full])

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        features = features_of_ids(bags)
        slots = [[self._rows(bags.ids, features)]]
        if len(self.lookups) > 1:
            slots.append([self._numbers.slots(bags.ids, features)])
        return slots

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        if len(rows) == 1:
            return rows[0][0]
        numbers = self._numbers.numbers(rows[1][0], bags.ids)
        is_hashed = self._is_hashed.of_ids(bags)
        if is_hashed is not None:
            # Full tables: times 1, plus 0.
            numbers = numbers * is_hashed + (1 - is_hashed) * numbers.new_tensor(self._start)
        vectors = weighted_sum(rows[0][0].unsqueeze(0), numbers[:, :1])
        return vectors + numbers[:, 1:] if numbers.shape[1] > 1 else vectors

    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every table: exactly where it stays full, else a row starts at the mean of its ids' rows."""
        weight = self.get_parameter("lookups.0.embedding_bags.memcom_rows.weight")
        return seed_with_means(weight, self.tables, full_tables, self._rows.of_feature)

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        return proportional_range(tables)
