"""Tiered tables: frequent ids own rows of 8 bits, all others share hashed rows of fewer bits.

Three published parts in one table, a combination that is not published:

* multiplexed hashing for the tail, several lookups an id in rows that all features share: Coleman et al., "Unified
  Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems", NeurIPS 2023, arXiv:2305.12102;
* rows of their own for frequent ids, as AdaptEmb in Zhang et al., "Experimental Analysis of Large-scale Learnable
  Vector Storage Compression", VLDB 2024, arXiv:2311.15578;
* float32 rows rounded to a few bits with a scale a row once they are trained: Guan et al., "Post-Training 4-bit
  Quantization on Embedding Tables", arXiv:1911.02079. Training on rounded rows, as Li et al. improve on it in
  "Adaptive Low-Precision Training for Embeddings in Click-Through Rate Prediction", AAAI 2023, arXiv:2212.05735, cost
  time here and gained nothing at 4 bits.

Differs from the papers: the most frequent ids are chosen over all tables together instead of table by table; a row has
a scale of one byte around 0, where Guan et al. search for two float16 bounds.

Shapes: N ids in all bags, F features, D embedding_dim, k num_lookups, W = D / k, R rows, K ids that own rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.frequency_blocks import frequent_ids
from recemb.hashing import MAX_SLOTS, hash_to_slots, salt
from recemb.method import (
    UNBOUNDED,
    CompressedTables,
    Method,
    full_table_variance,
    physical_table,
    uniform_bound,
)
from recemb.quantised_rows import CODE_BITS, QuantisedRows, as_served, largest_code
from recemb.stacked import at_features, features_of_ids, first_rows, means_per_row, per_feature
from recemb.table_rows import read_rows

_HEAD_BITS = 8
_ROWS_AT_ONCE = 1 << 18


class Tiered(CompressedTables):
    """Gives a frequent id k rows of its own, any other k hashed rows of a range that all tables share, side by side.

    The rows are one physical table: ``k * K`` own ones first. It trains in float32. In evaluation it gives the vectors
    that it will serve, own rows rounded to 8 bits, shared ones to ``tail_bits``, both with a byte of scale a row;
    ``convert`` makes ``PackedTiers`` of it, which has them in so many bits.

    Memory: serving ``k * K * (W + 1) + (R - k * K) * (W * tail_bits / 8 + 1)`` bytes and some integers a feature;
    training ``R * W * 4``. No map: ids of a table are in descending order of train frequency, so those that own rows
    are its first, and one number a table says how many.

    Args:
        tables: the logical tables, of one embedding_dim; tables of unbounded ids own no rows.
        num_embeddings: R; what a byte budget turns. From ``k`` times the number of ids on, every id owns its rows.
        own_fraction: share of the rows that belong to one id each, in [0, 1).
        num_lookups: k; ``embedding_dim / k`` must be a multiple of 4. More make collisions of whole vectors rarer, and
            rows narrower, whose scales weigh more.
        tail_bits: 8 or 4 bits a value of shared rows.
        train_counts: table name -> (num_embeddings,) how often each id comes in training; decides how many ids of each
            table are among the K most frequent of all. None: id ``i`` of one table is taken to be as frequent as id
            ``i`` of any other, so tables own equally many as far as they have them. Bytes are the same either way.
        seed: changes every hash at once.

    Raises:
        ValueError: an option out of range, a width that num_lookups does not divide into multiples of 4, counts that
            are missing, of another length or negative.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> Tiered(tables, num_embeddings=1000).convert()
        PackedTiers(...)
    """

    budget_knob: ClassVar[str | None] = "num_embeddings"
    supports_unbounded: ClassVar[bool] = True
    merges_ids: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_embeddings: int,
        own_fraction: float = 0.5,
        num_lookups: int = 2,
        tail_bits: int = 4,
        train_counts: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= own_fraction < 1:
            raise ValueError(f"own_fraction must be in [0, 1), got {own_fraction}")
        if tail_bits not in CODE_BITS:
            raise ValueError(f"tail_bits must be one of {CODE_BITS}, got {tail_bits}")
        width = _row_width(tables, num_lookups)
        self._sizes = _TierSizes.of(tables, num_embeddings, own_fraction, num_lookups)
        bound = uniform_bound(full_table_variance(tables))
        rows = self._sizes.num_own_rows + self._sizes.num_shared_rows
        super().__init__(tables, [[physical_table("tiered", rows, width, bound)]])
        own = frequent_ids(tables, self._sizes.num_own_rows // num_lookups, train_counts)
        self.tiers = _Tiers(tables, self._sizes, own, seed)
        self._dim = tables[0].embedding_dim
        self._tail_bits = tail_bits
        self._seed = seed

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        """[[(..., k)]]: the rows of each id."""
        return [[self.tiers(bags)]]

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        if self.training:
            return rows[0][0].view(bags.ids.numel(), self._dim)
        vectors_NkW = rows[0][0].view(bags.ids.numel(), self._sizes.num_lookups, rows[0][0].shape[1])
        largest: Tensor | int = largest_code(_HEAD_BITS)
        if self._tail_bits != _HEAD_BITS:
            is_own = self.tiers.are_own(bags).view(-1, 1, 1)
            largest = torch.where(is_own, float(largest), float(largest_code(self._tail_bits)))
        return as_served(vectors_NkW, largest).flatten(1)

    def serving_method(self) -> Method:
        return functools.partial(
            PackedTiers,
            num_own_rows=self._sizes.num_own_rows,
            num_shared_rows=self._sizes.num_shared_rows,
            num_lookups=self._sizes.num_lookups,
            tail_bits=self._tail_bits,
            seed=self._seed,
        )

    def convert(self) -> CompressedTables:
        """Packed tiers on the CPU, with the rows trained so far.

        Raises:
            ValueError: rows that are not finite, or beyond what scales reach (30 times the largest code).
        """
        packed = self.serving_method()(self.tables)
        assert isinstance(packed, PackedTiers)
        packed.tiers.load_state_dict(self.tiers.state_dict())
        num_own, device = self._sizes.num_own_rows, self.tiers.own.device
        for part, first in ((packed.own_rows, 0), (packed.shared_rows, num_own)):
            for rows in torch.arange(part.num_rows, device=device).split(_ROWS_AT_ONCE):
                part.write(int(rows[0]), read_rows(self, 0, rows + first).cpu())
        return packed

    @torch.no_grad()
    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every bounded table: rows of one id exactly, shared ones at the mean of what full tables hold for them."""
        weight = self.get_parameter("lookups.0.embedding_bags.tiered.weight")
        rows, values, seeded, feature = [], [], [], 0
        for table in self.tables:
            if table.num_embeddings < UNBOUNDED:
                ids = torch.arange(table.num_embeddings, device=weight.device)
                rows.append(self.tiers.rows_of(ids, torch.full_like(ids, feature)).view(-1))
                values.append(full_tables[table.name].to(weight.device, torch.float32).reshape(-1, weight.shape[1]))
                seeded.append(table.name)
            feature += len(table.feature_names)
        if seeded:
            means, has_ids = means_per_row(weight.shape[0], torch.cat(rows), torch.cat(values))
            weight.copy_(torch.where(has_ids.unsqueeze(1), means, weight))
        return seeded

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        bounded = sum(table.num_embeddings for table in tables if table.num_embeddings < UNBOUNDED)
        # Narrow rows: an id owns as many as fit its vector, at most.
        widest = max(table.embedding_dim for table in tables) // 4
        return 1, bounded * widest if bounded == sum(table.num_embeddings for table in tables) else 1 << 33


class PackedTiers(CompressedTables):
    """Tiered tables as they serve: rows in 8 bits for ids that own them, shared ones in ``tail_bits``.

    Made by ``Tiered.convert``, which also says how many ids of each table own rows. Nothing in it trains.

    Args:
        tables: the logical tables, of one embedding_dim.
        num_own_rows, num_shared_rows: rows of either kind.
        num_lookups, tail_bits, seed: as for ``Tiered``.
    """

    supports_unbounded: ClassVar[bool] = True
    merges_ids: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_own_rows: int,
        num_shared_rows: int,
        num_lookups: int,
        tail_bits: int,
        seed: int = 0,
    ) -> None:
        super().__init__(tables, [])
        width = _row_width(tables, num_lookups)
        self.tiers = _Tiers(tables, _TierSizes(num_own_rows, num_shared_rows, num_lookups), [0] * len(tables), seed)
        self._dim = tables[0].embedding_dim
        self.own_rows = QuantisedRows(num_own_rows, width, _HEAD_BITS)
        self.shared_rows = QuantisedRows(num_shared_rows, width, tail_bits)

    def embed_each(self, bags: Bags) -> Tensor:
        rows = self.tiers(bags).view(-1)
        is_own = rows < self.own_rows.num_rows
        vectors = torch.empty(rows.numel(), self.own_rows.width, device=rows.device)
        for part, chosen, first in (
            (self.own_rows, is_own, 0),
            (self.shared_rows, is_own.logical_not(), self.own_rows.num_rows),
        ):
            places = chosen.nonzero().view(-1)
            vectors.index_copy_(0, places, part(rows.index_select(0, places) - first))
        return vectors.view(bags.ids.numel(), self._dim)


@dataclass(frozen=True)
class _TierSizes:
    """Rows of one id each, rows that ids share, and rows of a vector."""

    num_own_rows: int
    num_shared_rows: int
    num_lookups: int

    @staticmethod
    def of(
        tables: Sequence[EmbeddingBagConfig], num_embeddings: int, own_fraction: float, num_lookups: int
    ) -> _TierSizes:
        if not 1 <= num_embeddings <= MAX_SLOTS:
            raise ValueError(f"num_embeddings must be in [1, {MAX_SLOTS}] rows, got {num_embeddings}")
        num_ids = sum(table.num_embeddings for table in tables if table.num_embeddings < UNBOUNDED)
        is_bounded = all(table.num_embeddings < UNBOUNDED for table in tables)
        if is_bounded and num_embeddings >= num_lookups * num_ids:
            return _TierSizes(num_lookups * num_ids, 0, num_lookups)
        own = num_lookups * min(int(num_embeddings * own_fraction / num_lookups), num_ids)
        return _TierSizes(own, num_embeddings - own, num_lookups)


class _Tiers(nn.Module):
    """Turns ids into their k rows, own ones first.

    Args:
        tables: the logical tables.
        sizes: rows of either kind.
        own: ids of each table that own rows.
        seed: of the hashes.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig], sizes: _TierSizes, own: Sequence[int], seed: int) -> None:
        super().__init__()
        self._sizes = sizes
        # What serving needs is saved, and counted in the model's bytes; how many ids own rows depends on train counts,
        # which nobody has at hand when a model is loaded.
        self.own: Tensor
        self.register_buffer("own", per_feature(tables, own))
        self.starts: Tensor
        self.register_buffer("starts", per_feature(tables, first_rows(own)))
        self.salts: Tensor
        salts = [
            per_feature(tables, [salt(table.name, lookup, seed) for table in tables])
            for lookup in range(sizes.num_lookups)
        ]
        self.register_buffer("salts", torch.stack(salts, dim=1))

    def forward(self, bags: Bags) -> Tensor:
        """(..., k) int64 rows of the ids of ``bags``."""
        return self.rows_of(bags.ids, features_of_ids(bags))

    def rows_of(self, ids: Tensor, features: Tensor | None) -> Tensor:
        """(..., k) int64 rows of (B, F) ids, or of (N,) ones with the (N,) feature of each."""
        num_lookups, num_own_rows = self._sizes.num_lookups, self._sizes.num_own_rows
        # Where every id owns its rows, hashes are not used, and must be valid.
        shared = hash_to_slots(
            ids.unsqueeze(-1), at_features(self.salts, features), max(self._sizes.num_shared_rows, 1)
        )
        shared += num_own_rows
        own = (ids + at_features(self.starts, features)).unsqueeze(-1) * num_lookups
        own = own + torch.arange(num_lookups, device=ids.device)
        return torch.where(self._are_own(ids, features).unsqueeze(-1), own, shared)

    def are_own(self, bags: Bags) -> Tensor:
        """Which ids own rows, bool in the shape of ``bags.ids``."""
        return self._are_own(bags.ids, features_of_ids(bags))

    def _are_own(self, ids: Tensor, features: Tensor | None) -> Tensor:
        return ids < at_features(self.own, features)


def _row_width(tables: Sequence[EmbeddingBagConfig], num_lookups: int) -> int:
    dim = tables[0].embedding_dim
    if num_lookups < 1 or dim % num_lookups or dim // num_lookups % 4:
        raise ValueError(f"embedding_dim ({dim}) / num_lookups must be a multiple of 4, got num_lookups {num_lookups}")
    return dim // num_lookups
