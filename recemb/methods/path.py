"""Path-based compositional embeddings: a row for the id's remainder, changed by a small map for its quotient.

Reference: Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation
Systems", KDD 2020, arXiv:1909.02107. There they never beat the product of rows (``Complementary``), and cost more.

Differs from the paper: two partitions, as in its experiments, and all widths equal ``embedding_dim``; maps start so
that vectors have the variance of a full table.

Maps are dense parameters, not rows of a physical table: there are few (c a table), a batch uses all of them, and as a
row each id would fetch the ``embedding_dim * hidden_units`` values that all ids of a quotient share.

Shapes: N ids, B batch, F features, D embedding_dim, H hidden_units, M maps of all tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.grouped_linear import grouped_linear, sort_by_group
from recemb.method import CompressedTables, uniform_bound
from recemb.partitions import choose_partitions
from recemb.spending import spend
from recemb.stacked import (
    at_features,
    features_of_ids,
    first_rows,
    per_feature,
    seed_full_tables,
    stacked_table,
    start_variance,
)


class Path(CompressedTables):
    """Gives id ``i`` the vector ``map_{i // m}(row_{i % m})``, ``m = ceil(n / c)``: linear, or a layer of ReLU between.

    Ids that share a row are m apart, so with ids in order of frequency a frequent one shares with rare ones
    (``recemb.partitions``).

    Memory: ``m`` rows of ``embedding_dim`` values, and c maps of ``D * D + D`` values (linear) or
    ``2 * D * H + H + D``. A table takes the cheapest number of maps up to c, and stays full where none is
    cheaper, which a map of some dozen rows' size makes likely for small tables.

    Args:
        tables: the logical tables.
        num_collisions: c, ids that share a row. The paper takes 4.
        num_parameters: floats in all, maps included, instead of num_collisions; what a byte budget turns. All tables
            take the smallest c that this pays, and some the next smaller ones, which uses up the rest.
        hidden_units: H, or None for linear maps. The paper tries 16 to 128; 64 is best there, and 128 worse than 16.

    Raises:
        ValueError: both or neither of num_collisions and num_parameters; one of them or hidden_units below 1.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> Path(tables, num_collisions=4, hidden_units=64)
        Path(...)
    """

    budget_knob: ClassVar[str | None] = "num_parameters"
    merges_ids: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_collisions: int | None = None,
        num_parameters: int | None = None,
        hidden_units: int | None = None,
    ) -> None:
        if (num_collisions is None) == (num_parameters is None):
            raise ValueError(
                f"Path: give num_collisions or a budget (num_parameters), one of them; "
                f"got num_collisions={num_collisions}, num_parameters={num_parameters}"
            )
        if hidden_units is not None and hidden_units < 1:
            raise ValueError(f"hidden_units must be at least 1, or None for linear maps, got {hidden_units}")
        width = tables[0].embedding_dim
        layers = [(width, width)] if hidden_units is None else [(width, hidden_units), (hidden_units, width)]
        map_values = sum(inputs * outputs + outputs for inputs, outputs in layers)
        sizes = [table.num_embeddings for table in tables]

        def rows_and_maps(size: int, collisions: int) -> tuple[int, int]:
            """Of one table; a row an id and no map where it stays full."""
            remainders, quotients = choose_partitions(
                "remainder_first", size, collisions, 2, cost_ratio=map_values / width
            ).sizes
            shrinks = remainders * width + quotients * map_values < size * width
            return (remainders, quotients) if shrinks else (size, 0)

        def cost(index: int, level: int) -> int:
            rows, maps = rows_and_maps(sizes[index], most - level)
            return rows * width + maps * map_values

        most = math.isqrt(max(sizes)) + 1
        if num_collisions is not None:
            collisions = [num_collisions] * len(sizes)
        else:
            collisions = [most - level for level in spend(num_parameters or 0, sizes, most, cost)]
        chosen = [rows_and_maps(size, count) for size, count in zip(sizes, collisions, strict=True)]
        rows = [count for count, _ in chosen]
        self.num_collisions = [max(maps, 1) for _, maps in chosen]
        super().__init__(tables, [[stacked_table("path_rows", rows, width, [start_variance(t) for t in tables])]])
        # What serving needs is saved, and counted in the model's bytes.
        self.divisors: Tensor
        self.register_buffer("divisors", per_feature(tables, rows))
        self.starts: Tensor
        self._first_rows = first_rows(rows)
        self.register_buffer("starts", per_feature(tables, self._first_rows))
        self.is_full = [count == table.num_embeddings for table, count in zip(tables, rows, strict=True)]
        maps = [0 if full else count for full, count in zip(self.is_full, self.num_collisions, strict=True)]
        # Full tables have no map: their group comes after all maps, and keeps its rows.
        first_maps = [sum(maps) if full else first for full, first in zip(self.is_full, first_rows(maps), strict=True)]
        self._first_maps: Tensor
        self.register_buffer("_first_maps", per_feature(tables, first_maps), persistent=False)
        self._num_maps = sum(maps)
        # A layer keeps the variance of its input; ReLU before it halves the mean square it sees.
        self.layers = nn.ModuleList(
            _Maps(self._num_maps, inputs, outputs, (2 if number else 1) / inputs)
            for number, (inputs, outputs) in enumerate(layers if self._num_maps else [])
        )

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        return [[self._rows_and_maps(bags)[0]]]

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        order, counts = self._by_map(self._rows_and_maps(bags)[1])
        return self._scatter(self._through_maps(rows[0][0].index_select(0, order), counts), order)

    def embed_each(self, bags: Bags) -> Tensor:
        if not self.layers:
            return self.lookup_rows(0, [self._rows_and_maps(bags)[0].reshape(-1)])[0]
        # Slots are brought together by map before they are looked up, which spares sorting the rows. Maps are part of
        # the output of a batch without ids too: ranks wait for the gradient of all of them.
        slots, maps = self._rows_and_maps(bags)
        order, counts = self._by_map(maps)
        [rows] = self.lookup_rows(0, [slots.view(-1)[order]])
        return self._scatter(self._through_maps(rows, counts), order)

    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Tables that stay full."""
        weight = self.get_parameter("lookups.0.embedding_bags.path_rows.weight")
        return seed_full_tables([(weight, self._first_rows)], self.tables, self.is_full, full_tables)

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        return 1, sum(table.num_embeddings * table.embedding_dim for table in tables)

    def _rows_and_maps(self, bags: Bags) -> tuple[Tensor, Tensor]:
        features = features_of_ids(bags)
        divisors = at_features(self.divisors, features)
        # Integers: ids / c would pass through float32 and misplace ids above 2**24.
        quotients = torch.div(bags.ids, divisors, rounding_mode="floor")
        rows = bags.ids - quotients * divisors + at_features(self.starts, features)
        return rows, quotients + at_features(self._first_maps, features)

    def _by_map(self, maps: Tensor) -> tuple[Tensor, list[int]]:
        """Positions of ids map after map, and how many ids each has; those without come last."""
        order = sort_by_group(maps.reshape(-1))
        return order, torch.bincount(maps.view(-1), minlength=self._num_maps + 1).tolist()

    def _through_maps(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by map, through their maps."""
        vectors, unchanged = rows.split([rows.shape[0] - counts[-1], counts[-1]])
        for number, layer in enumerate(self.layers):
            vectors = layer(torch.relu(vectors) if number else vectors, counts[:-1])
        return torch.cat([vectors, unchanged]) if counts[-1] else vectors

    def _scatter(self, vectors: Tensor, order: Tensor) -> Tensor:
        return vectors.new_empty(vectors.shape).index_copy_(0, order, vectors)


class _Maps(nn.Module):
    """One layer of every map."""

    def __init__(self, num_maps: int, inputs: int, outputs: int, variance: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_maps, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(num_maps, outputs))
        bound = uniform_bound(variance)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return grouped_linear(rows, self.weight, self.bias, counts)
