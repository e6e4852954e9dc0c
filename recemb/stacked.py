"""Logical tables of one width as ranges of rows of one physical table, which is read as bags of one id.

On CPU one tall table with one feature is read and trained up to twice as fast as many tables, or one with many
features, so methods stack their tables and turn (feature, id) into a row by integer arithmetic on the whole batch.

Shapes: N ids in all bags, F features, T logical tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.hashing import hash_to_ranges, salt, slot_prefixes
from recemb.initial_rows import UniformRanges
from recemb.method import UNBOUNDED, CompressedTables, full_table_variance, physical_table, uniform_bound

HASH_FUNCTIONS = ("universal", "modulo")


class HashedRows(nn.Module):
    """Turns ids into rows of a stacked table: the first ids of a table to rows of their own, the others by hash.

    Id ``i`` of table ``t`` goes to row ``start_t + i`` where ``i < own_t``, else ``start_t + own_t + h_t(i)`` with
    ``h_t(i)`` in ``[0, hashed_t)``. A full table is one whose ids are all its own.

    Args:
        tables: the logical tables.
        own: rows of each table that belong to one id; ids are in order of frequency, so these are the frequent ones.
        hashed: rows of each table that ids share; 0 is allowed where every id has a row of its own.
        hash_function: ``"universal"`` (salted 64-bit mixing: independent between tables and lookups) or ``"modulo"``
            (remainder of the id: no two of ``hashed_t`` consecutive ids collide, which evens out frequent ids).
        num_lookups: how many independent universal hashes of an id there are to choose from,
        first_lookup: numbered from here on.
        seed: changes every universal hash at once.
        shared: all tables share the first table's rows instead of having their own.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        own: Sequence[int],
        hashed: Sequence[int],
        *,
        hash_function: str = "universal",
        num_lookups: int = 1,
        first_lookup: int = 0,
        seed: int = 0,
        shared: bool = False,
    ) -> None:
        super().__init__()
        if hash_function not in HASH_FUNCTIONS:
            raise ValueError(f"hash_function must be one of {HASH_FUNCTIONS}, got {hash_function!r}")
        # Ids of a full table are hashed to a number of slots that is not used, and must be valid.
        slots = [max(rows, 1) for rows in hashed]
        starts = [0] * len(slots) if shared else first_rows([a + b for a, b in zip(own, hashed, strict=True)])
        self._is_universal = hash_function == "universal"
        self._has_own = any(own)
        self._most_slots = max(slots)
        # What serving needs is saved, and counted in the model's bytes.
        self.num_slots: Tensor
        self.register_buffer("num_slots", per_feature(tables, slots))
        self.starts: Tensor
        self.register_buffer("starts", per_feature(tables, starts))
        self.own: Tensor | None
        self.register_buffer("own", per_feature(tables, own) if self._has_own else None)
        self.salts: Tensor | None
        salts = [
            per_feature(tables, [salt(table.name, first_lookup + index, seed) for table in tables])
            for index in range(num_lookups)
        ]
        self.register_buffer("salts", torch.stack(salts) if self._is_universal else None)
        self._prefixes: Tensor
        self.register_buffer("_prefixes", per_feature(tables, slot_prefixes(slots)), persistent=False)
        first_hashed = [start + count for start, count in zip(starts, own, strict=True)]
        self._first_hashed: Tensor
        self.register_buffer("_first_hashed", per_feature(tables, first_hashed), persistent=False)

    def forward(self, ids: Tensor, features: Tensor | None, lookup: int = 0) -> Tensor:
        """Rows of ids, int64, same shape.

        Args:
            ids: (B, F), or (N,) with
            features: the (N,) feature of each id (see ``features_of_ids``).
            lookup: which of the hashes.
        """
        num_slots = at_features(self.num_slots, features)
        if self.salts is not None:
            salts, prefixes = at_features(self.salts[lookup], features), at_features(self._prefixes, features)
            rows = hash_to_ranges(ids, salts, num_slots, prefixes, most_slots=self._most_slots)
        else:
            rows = ids % num_slots
        rows += at_features(self._first_hashed, features)
        if self.own is not None:
            rows = torch.where(ids < at_features(self.own, features), ids + at_features(self.starts, features), rows)
        return rows

    def of_feature(self, feature: int, ids: Tensor, lookup: int = 0) -> Tensor:
        """Rows of (N,) ids of one feature."""
        return self(ids, torch.full_like(ids, feature), lookup)


def at_features(constants: Tensor, features: Tensor | None) -> Tensor:
    """(F,) constants as they are where ids are (B, F), and gathered by the (N,) feature of each id otherwise."""
    return constants if features is None else constants.index_select(0, features)


def features_of_ids(bags: Bags) -> Tensor | None:
    """(N,) feature of each id; None where ids are (B, F) and constants broadcast."""
    return None if bags.single else bags.per_id(torch.arange(bags.num_features, device=bags.ids.device))


def per_feature(tables: Sequence[EmbeddingBagConfig], values: Sequence[int]) -> Tensor:
    """One integer a table -> (F,) int64, one a feature."""
    return torch.tensor(
        [value for table, value in zip(tables, values, strict=True) for _ in table.feature_names], dtype=torch.int64
    )


def first_rows(rows: Sequence[int]) -> list[int]:
    """Where each range of a stacked table begins."""
    return [0, *itertools.accumulate(rows[:-1])]


def proportional_rows(tables: Sequence[EmbeddingBagConfig], num_embeddings: int) -> list[int]:
    """Shares ``num_embeddings`` rows out in proportion to the tables' own, at least one row and at most all of them.

    A table of unbounded ids counts as much as the largest bounded one.

    Raises:
        ValueError: fewer than one row.
    """
    if num_embeddings < 1:
        raise ValueError(f"num_embeddings must be at least 1 row, got {num_embeddings}")
    largest = max((table.num_embeddings for table in tables if table.num_embeddings < UNBOUNDED), default=1)
    sizes = [largest if table.num_embeddings == UNBOUNDED else table.num_embeddings for table in tables]
    total = sum(sizes)
    return [
        min(max(num_embeddings * size // total, 1), table.num_embeddings)
        for size, table in zip(sizes, tables, strict=True)
    ]


def proportional_range(tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
    """Useful range of ``num_embeddings`` in ``proportional_rows``: from one row a table to full tables.

    Unbounded ids have no full table: where there are any, a budget is used up however small the other tables are.
    """
    if has_unbounded(tables):
        return 1, 1 << 33
    return 1, sum(table.num_embeddings for table in tables)


def has_unbounded(tables: Sequence[EmbeddingBagConfig]) -> bool:
    """Whether a table has 64-bit hashes for ids, which any number of rows serves."""
    return any(table.num_embeddings == UNBOUNDED for table in tables)


def start_variance(table: EmbeddingBagConfig) -> float:
    """Variance a vector of ``table`` starts with: that of TorchRec's full table."""
    return full_table_variance([table])


def stacked_table(name: str, rows: Sequence[int], width: int, variances: Sequence[float]) -> EmbeddingBagConfig:
    """A physical table of ``sum(rows)`` rows, whose ranges start uniform around 0 with these variances."""
    ranges = [(count, uniform_bound(variance)) for count, variance in zip(rows, variances, strict=True)]
    return physical_table(name, sum(rows), width, UniformRanges(ranges))


def forward_linear(method: CompressedTables, bags: Bags, mean: Tensor | None) -> Tensor:
    """``forward`` of a method whose vectors are linear in the rows of one group of lookups: the kernel pools."""
    if bags.single or bags.weights is not None:
        return bags.pool(method.embed(bags), mean)
    [slots] = method.remap(bags)
    lengths = bags.lengths.view(-1)
    sums = method.lookup_bags(0, slots, bag_offsets(lengths, len(slots)), lengths.numel())
    rows = list(sums.split([config.embedding_dim for config in method.physical_tables[0]], dim=1))
    return bags.lay_out(method.composed([rows], bags, lengths.numel()), mean)


@torch.no_grad()
def seed_full_tables(
    stacks: Sequence[tuple[Tensor, Sequence[int]]],
    tables: Sequence[EmbeddingBagConfig],
    is_full: Sequence[bool],
    full_tables: Mapping[str, Tensor],
) -> list[str]:
    """Copy trained tables into the ranges of those that stay full, cut by columns where there are several stacks.

    Args:
        stacks: weight of each stacked table, with the first row of each logical table.
        tables, is_full: the logical tables, and which of them stay full.
        full_tables: table name -> (num_embeddings, embedding_dim) float32.

    Returns:
        The names of the full ones.
    """
    names = []
    for index, table in enumerate(tables):
        if is_full[index]:
            for (weight, starts), part in zip(stacks, full_tables[table.name].chunk(len(stacks), dim=1), strict=True):
                weight[starts[index] : starts[index] + table.num_embeddings] = part.to(weight.device, weight.dtype)
            names.append(table.name)
    return names


@torch.no_grad()
def seed_with_means(
    weight: Tensor,
    tables: Sequence[EmbeddingBagConfig],
    full_tables: Mapping[str, Tensor],
    rows_of: Callable[[int, Tensor, int], Tensor],
    *,
    num_lookups: int = 1,
    own: Sequence[int] | None = None,
) -> list[str]:
    """Start every row at the mean of the trained vectors of its ids, divided by the number of rows that are summed.

    Args:
        weight: of the stacked table; rows without ids keep what they have.
        tables: the logical tables; unbounded ones have no vectors to take.
        full_tables: table name -> (num_embeddings, embedding_dim) float32.
        rows_of: (feature, (N,) ids, lookup) -> (N,) rows.
        num_lookups: rows that are summed to an id's vector.
        own: ids of each table, from 0, whose vector is one row; none by default.

    Returns:
        The names of the bounded tables.
    """
    rows, vectors, names, feature = [], [], [], 0
    for index, table in enumerate(tables):
        if table.num_embeddings < UNBOUNDED:
            ids = torch.arange(table.num_embeddings, device=weight.device)
            shares = full_tables[table.name].to(weight.device, weight.dtype) / num_lookups
            if own is not None:
                shares[: own[index]] *= num_lookups
            rows += [rows_of(feature, ids, lookup) for lookup in range(num_lookups)]
            vectors += [shares] * num_lookups
            names.append(table.name)
        feature += len(table.feature_names)
    if names:
        means, has_ids = means_per_row(weight.shape[0], torch.cat(rows), torch.cat(vectors))
        weight.copy_(torch.where(has_ids.unsqueeze(1), means, weight))
    return names


def means_per_row(total_rows: int, rows: Tensor, values_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the values that fall on each row: ((total_rows, D), (total_rows,) whether any did)."""
    sums = values_ND.new_zeros(total_rows, values_ND.shape[1]).index_add_(0, rows, values_ND)
    counts = torch.bincount(rows, minlength=total_rows)
    return sums / counts.clamp(min=1).unsqueeze(1), counts > 0


class FeatureGate(nn.Module):
    """Open for ids of some tables, closed for those of others.

    Tables that stay full need no second row. Their ids look one up all the same, any row there is, behind a closed
    gate: it counts for nothing and its gradient is 0. Leaving them out of the call costs more, in bags that are not of
    one id or in rows that must be put in their places.

    Args:
        tables: the logical tables.
        is_open: for which of them.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig], is_open: Sequence[bool]) -> None:
        super().__init__()
        self._is_open: Tensor | None
        flags = per_feature(tables, is_open).to(torch.float32)
        self.register_buffer("_is_open", None if all(is_open) else flags, persistent=False)

    def of_ids(self, bags: Bags) -> Tensor | None:
        """(N, 1) float32, 1 or 0, in the order of ``bags.ids.view(-1)``; None where it is open for all tables."""
        if self._is_open is None:
            return None
        if bags.single:
            return self._is_open.expand(bags.ids.shape).reshape(-1, 1)
        return bags.per_id(self._is_open).unsqueeze(1)

    def of_bags(self, bags: Bags) -> Tensor | None:
        """(F * B, 1) float32, 1 or 0, feature after feature."""
        if self._is_open is None:
            return None
        return self._is_open.unsqueeze(1).expand(bags.lengths.shape).reshape(-1, 1)


def bag_offsets(lengths: Tensor, num_tables: int = 1) -> Tensor:
    """(num_tables * bags + 1,) int64 starts of bags of these lengths, the same for each table."""
    offsets = torch.zeros(lengths.numel() * num_tables + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths.repeat(num_tables) if num_tables > 1 else lengths, dim=0, out=offsets[1:])
    return offsets
