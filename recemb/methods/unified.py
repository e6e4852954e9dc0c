"""Unified (multiplexed) embeddings: one table for all features, several hashed lookups per id.

Reference: Coleman et al., "Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems",
NeurIPS 2023, arXiv:2305.12102.

Differs from the paper: the hash is a frozen 64-bit mixer with multiply-shift reduction where the released code takes
SipHash and modulo; salts come from table names, so target item and history of one table share their vectors.

Shapes: N ids, B batch, F features, P probes (feature, lookup) of the batch, D embedding_dim, W = D / num_lookups,
S num_sub_tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.bags import Bags
from recemb.hashing import MAX_SLOTS, hash_to_slots, salt
from recemb.method import UNBOUNDED, CompressedTables, full_table_variance, physical_table, uniform_bound
from recemb.stacked import has_unbounded


class Unified(CompressedTables):
    """Gives id ``i`` of table ``t`` rows ``hash(t, 0, i)`` to ``hash(t, k_t - 1, i)`` of a shared table, concatenated.

    Memory: ``num_embeddings * W * 4`` bytes, whatever the vocabularies. Collisions between features are harmless where
    the consumer has weights of its own per feature (concatenation into dense, cross or dot layers); two ids of one
    feature are confused only if all their k_t rows collide.

    Args:
        tables: the logical tables; ids may be unbounded 64-bit hashes.
        num_embeddings: rows of the shared table, over all sub-tables (rounded up to a multiple of their number); what
            a byte budget turns.
        num_lookups: k_t, one number or one per table name. More lookups make collisions rarer and rows narrower at the
            same bytes; 1 or 2 for small widths, more for tables with many ids. ``embedding_dim / k_t`` (W) must be a
            multiple of 4 and the same for every table: wider tables take more lookups.
        num_sub_tables: S, cuts the rows into this many tables of equal size for sharding. The lookups of all tables
            take turns: number q of (table, lookup) reads sub-table ``q mod S``, for every feature of the table.
        seed: changes every hash at once.

    Raises:
        ValueError: rows not in [1, 2**40], more sub-tables than lookups of all tables, a width that num_lookups does
            not divide into multiples of 4, tables of several widths W, an unknown table name in num_lookups.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> Unified(tables, num_embeddings=1000, num_lookups=2)
        Unified(...)
    """

    budget_knob: ClassVar[str | None] = "num_embeddings"
    supports_unbounded: ClassVar[bool] = True
    one_width: ClassVar[bool] = False

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_embeddings: int,
        num_lookups: int | Mapping[str, int] = 1,
        num_sub_tables: int = 1,
        seed: int = 0,
    ) -> None:
        if num_sub_tables < 1 or num_embeddings < 1:
            raise ValueError(
                f"num_embeddings and num_sub_tables must be at least 1, got {num_embeddings} and {num_sub_tables}"
            )
        if num_embeddings > MAX_SLOTS:
            raise ValueError(f"num_embeddings must be in [1, {MAX_SLOTS}] rows, got {num_embeddings}")
        lookups = _lookups_per_table(tables, num_lookups)
        width = _common_width(tables, lookups)
        pairs = [(table.name, chunk) for table in tables for chunk in range(lookups[table.name])]
        if num_sub_tables > len(pairs):
            raise ValueError(
                f"num_sub_tables must be at most {len(pairs)} (lookups of all tables), or no id reads some of them, "
                f"got {num_sub_tables}"
            )
        bound = uniform_bound(full_table_variance(tables))
        # Sub-tables of equal size, so that no probe has fewer rows to fall on than another.
        self.rows_per_sub_table = -(-num_embeddings // num_sub_tables)
        super().__init__(
            tables,
            [
                [physical_table(f"unified__{index}", self.rows_per_sub_table, width, bound)]
                for index in range(num_sub_tables)
            ],
        )
        self._width = width
        probes = [
            (table.name, chunk) for table in tables for _ in table.feature_names for chunk in range(lookups[table.name])
        ]
        turns = {pair: number % num_sub_tables for number, pair in enumerate(pairs)}
        self._sub_tables: Tensor
        self.register_buffer("_sub_tables", torch.tensor([turns[probe] for probe in probes]), persistent=False)
        # Probes by sub-table, and how many each has.
        self._probes_in_turn: Tensor
        self.register_buffer("_probes_in_turn", torch.argsort(self._sub_tables, stable=True), persistent=False)
        self._num_probes = [sum(turns[probe] == index for probe in probes) for index in range(num_sub_tables)]
        features = [
            index
            for index, table in enumerate(table for table in tables for _ in table.feature_names)
            for _ in range(lookups[table.name])
        ]
        # Salts are part of the model, so they are saved, and counted in its bytes.
        self.salts: Tensor
        self.register_buffer("salts", torch.tensor([salt(name, chunk, seed) for name, chunk in probes]))
        self._probe_features: Tensor
        self.register_buffer("_probe_features", torch.tensor(features), persistent=False)
        self._is_mean_probe: Tensor | None
        is_mean = None if self._is_mean is None else self._is_mean[self._probe_features]
        self.register_buffer("_is_mean_probe", is_mean, persistent=False)
        self._one_probe_each = features == list(range(len(features)))

    def slots(self, bags: Bags) -> tuple[Bags, Tensor]:
        """The probes of the batch and their slots within a sub-table, in the order of the probes' ids.

        Probe ``p`` reads sub-table ``_sub_tables[p]``.
        """
        probes = bags if self._one_probe_each else bags.select(self._probe_features)
        return probes, hash_to_slots(probes.ids, probes.per_id(self.salts), self.rows_per_sub_table)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        probes, slots = self.slots(Bags.of(features))
        if len(self.lookups) == 1:
            return self._read(0, probes, slots, self._is_mean_probe)
        output = slots.new_empty(probes.batch_size, probes.num_features, self._width, dtype=torch.float32)
        for index, chosen in enumerate(self._probes_in_turn.split(self._num_probes)):
            mean = None if self._is_mean_probe is None else self._is_mean_probe[chosen]
            part = self._read(index, *_choose(probes, slots, chosen), mean)
            output.index_copy_(1, chosen, part.view(probes.batch_size, -1, self._width))
        return output.view(probes.batch_size, -1)

    def embed(self, bags: Bags) -> Tensor:
        # Unpooled tables of a group have one embedding_dim, so one number of lookups k: slots are (N, k).
        assert not bags.single
        feature_of_id = bags.per_id(torch.arange(bags.num_features, device=bags.ids.device))
        salts_Fk = self.salts.view(bags.num_features, -1)
        slots = hash_to_slots(bags.ids.unsqueeze(1), salts_Fk[feature_of_id], self.rows_per_sub_table)
        sub_table = self._sub_tables.view(bags.num_features, -1)[feature_of_id].view(-1)
        flat, rows = slots.view(-1), []
        order = torch.argsort(sub_table, stable=True) if len(self.lookups) > 1 else None
        counts = torch.bincount(sub_table, minlength=len(self.lookups)).tolist()
        for index, part in enumerate((flat if order is None else flat[order]).split(counts)):
            rows.append(self.lookup_rows(index, [part])[0])
        vectors = rows[0] if order is None else torch.cat(rows)[torch.argsort(order)]
        return vectors.view(bags.ids.numel(), salts_Fk.shape[1] * self._width)

    @torch.no_grad()
    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every bounded table, approximately: a row starts at the mean of what the full tables hold for its ids."""
        device = self.salts.device
        sums = [torch.zeros(self.rows_per_sub_table, self._width, device=device) for _ in self.lookups]
        counts = [torch.zeros(self.rows_per_sub_table, device=device) for _ in self.lookups]
        seeded, probe = [], 0
        sub_tables = self._sub_tables.tolist()
        for table in self.tables:
            chunks = table.embedding_dim // self._width
            for number in range(len(table.feature_names) * chunks):
                # Features of one table share their salts: its first feature says it all.
                if number < chunks and table.num_embeddings < UNBOUNDED:
                    ids = torch.arange(table.num_embeddings, device=device)
                    slots = hash_to_slots(ids, self.salts[probe], self.rows_per_sub_table)
                    part = full_tables[table.name][:, number * self._width : (number + 1) * self._width]
                    sums[sub_tables[probe]].index_add_(0, slots, part.to(device, torch.float32))
                    counts[sub_tables[probe]].index_add_(0, slots, torch.ones(len(ids), device=device))
                probe += 1
            if table.num_embeddings < UNBOUNDED:
                seeded.append(table.name)
        for index, (total, count) in enumerate(zip(sums, counts, strict=True)):
            weight = self.get_parameter(f"lookups.{index}.embedding_bags.unified__{index}.weight")
            weight.copy_(torch.where(count.unsqueeze(1) > 0, total / count.clamp(min=1).unsqueeze(1), weight))
        return seeded

    def _read(self, index: int, probes: Bags, slots: Tensor, mean: Tensor | None) -> Tensor:
        """Pooled rows of sub-table ``index``: (B, P * W)."""
        if probes.single or probes.weights is not None:
            return probes.pool(self.lookup_rows(index, [slots])[0], mean)
        # A concatenation of rows commutes with sums over the bag, so the kernel pools.
        sums = self.lookup_bags(index, [slots], probes.offsets(), probes.lengths.numel())
        return probes.lay_out(sums, mean)

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        if has_unbounded(tables):
            return 1, 1 << 33
        # k lookups of width D / k: as many bytes as full tables need k times their rows.
        widest = max(table.embedding_dim for table in tables) // 4
        return 1, min(sum(table.num_embeddings for table in tables) * widest, MAX_SLOTS)


def _choose(probes: Bags, slots: Tensor, chosen: Tensor) -> tuple[Bags, Tensor]:
    """The probes numbered ``chosen``, with their slots."""
    bags = Bags(slots, probes.lengths, probes.single, probes.weights).select(chosen)
    return bags, bags.ids


def _lookups_per_table(tables: Sequence[EmbeddingBagConfig], num_lookups: int | Mapping[str, int]) -> dict[str, int]:
    if isinstance(num_lookups, int):
        return {table.name: num_lookups for table in tables}
    names = {table.name for table in tables}
    if unknown := sorted(set(num_lookups) - names):
        raise ValueError(f"num_lookups names tables {unknown}, which are not among {sorted(names)}")
    if missing := sorted(names - set(num_lookups)):
        raise ValueError(f"num_lookups must name every table; missing {missing}")
    return dict(num_lookups)


def _common_width(tables: Sequence[EmbeddingBagConfig], lookups: Mapping[str, int]) -> int:
    widths: dict[int, str] = {}
    for table in tables:
        count = lookups[table.name]
        if count < 1 or table.embedding_dim % count or table.embedding_dim // count % 4:
            raise ValueError(
                f"table {table.name!r}: embedding_dim ({table.embedding_dim}) / num_lookups must be a multiple of 4, "
                f"got num_lookups {count}"
            )
        widths.setdefault(table.embedding_dim // count, table.name)
    if len(widths) > 1:
        raise ValueError(
            "embedding_dim / num_lookups must be one width for all tables of the shared table, got "
            + ", ".join(f"{width} ({name!r})" for width, name in sorted(widths.items()))
        )
    return next(iter(widths))
