"""CAFE: ids that matter now have rows of their own, found by a sketch while training; the others share hashed rows.

Reference: Zhang et al., "CAFE: Towards Compact, Adaptive, and Fast Embedding for Large-scale Recommendation Models",
SIGMOD 2024, arXiv:2312.03256.

Differs from the paper: a batch is one insertion. Scores of an id are added up first; ids the sketch knows come before
those it does not, and of these the strongest fill empty slots and the strongest of the rest replaces the weakest cold
id of its bucket, taking over its score and that of all the rest: what the released code does for one such order of the
ids. Free rows go to the strongest candidates. Hashed rows are shared out by table size with a salted hash. Tables stay
full where their share is all their rows, and are unknown to the sketch.

Shapes: N ids, B batch, F features, D embedding_dim, H hot rows = buckets of the sketch, U distinct ids of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.hashing import mix, salt
from recemb.method import UNBOUNDED, CompressedTables, full_table_variance
from recemb.stacked import (
    HashedRows,
    at_features,
    features_of_ids,
    first_rows,
    means_per_row,
    per_feature,
    proportional_range,
    proportional_rows,
    stacked_table,
    start_variance,
)
from recemb.table_rows import read_rows, write_rows

SCORES = ("gradient_norm", "frequency")
_SLOTS = 4
# Scores decay once this many times threshold * buckets has been inserted.
_DECAY_AFTER = 10


class HotSketch(nn.Module):
    """Buckets of four slots (key, score, hot row or -1): which keys are hot, and which may become so.

    Args:
        num_rows: H, hot rows and buckets.
        key_dtype: int32 or int64; keys are at least 0.
        threshold: score from which a key is hot.
        decay: factor of all scores, once enough has been inserted.
    """

    def __init__(self, num_rows: int, *, key_dtype: torch.dtype, threshold: float, decay: float) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.threshold = threshold
        self.decay = decay
        self.keys: Tensor
        self.register_buffer("keys", torch.full((num_rows, _SLOTS), -1, dtype=key_dtype))
        self.scores: Tensor
        self.register_buffer("scores", torch.zeros(num_rows, _SLOTS))
        self.hot_rows: Tensor
        self.register_buffer("hot_rows", torch.full((num_rows, _SLOTS), -1, dtype=torch.int32))
        self.inserted: Tensor
        self.register_buffer("inserted", torch.zeros((), dtype=torch.float64))
        self._used = torch.zeros(0, dtype=torch.bool)
        self._used_of: tuple[int, int] | None = None

    @staticmethod
    def bytes_per_row(key_dtype: torch.dtype) -> int:
        """Bytes of one bucket, of which there is one a hot row."""
        return _SLOTS * (key_dtype.itemsize + 4 + 4)

    def find(self, keys: Tensor) -> Tensor:
        """Hot row of every int64 key, -1 for cold and unknown ones; same shape."""
        buckets = (keys % self.num_rows).view(-1)
        known = self.keys.index_select(0, buckets) == keys.to(self.keys.dtype).view(-1, 1)
        # At most one slot matches; rows count from 1 here, so that the sum is 0 where none does.
        rows = (self.hot_rows.index_select(0, buckets) + 1).mul_(known)
        # Column by column, which is several times as fast as a sum over so short a dimension.
        row = (rows[:, 0] + rows[:, 1]).add_(rows[:, 2]).add_(rows[:, 3])
        return row.to(torch.int64).sub_(1).view(keys.shape)

    def insert(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Count a batch.

        Args:
            keys: (U,) int64, distinct and ascending.
            values: (U,) float32, at least 0, added to the scores.

        Returns:
            Positions in ``keys`` of those that became hot, and their hot rows.
        """
        if float(self.inserted) > _DECAY_AFTER * self.num_rows * self.threshold:
            self._decay()
        self.inserted += values.sum()
        buckets = keys % self.num_rows
        matches = self.keys[buckets] == keys.to(self.keys.dtype).unsqueeze(1)
        known = matches.any(dim=1)
        slots = buckets * _SLOTS + matches.to(torch.uint8).argmax(dim=1)
        positions = known.nonzero().view(-1)
        scores = self.scores.view(-1)
        scores[slots[positions]] += values[positions]
        promoted, rows = self._promote(positions, slots[positions])
        self._insert_unknown(keys[~known], values[~known], buckets[~known])
        return promoted, rows

    def _promote(self, positions: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        scores, hot_rows = self.scores.view(-1), self.hot_rows.view(-1)
        ready = (scores[slots] >= self.threshold) & (hot_rows[slots] < 0)
        positions, slots = positions[ready], slots[ready]
        if len(slots) == 0:
            return positions, slots
        strongest = torch.sort(scores[slots], descending=True, stable=True).indices
        rows = (~self._used_rows()).nonzero().view(-1)[: len(slots)]
        chosen = strongest[: len(rows)]
        hot_rows[slots[chosen]] = rows.to(torch.int32)
        self._used[rows] = True
        self._used_of = (id(self.hot_rows), self.hot_rows._version)
        return positions[chosen], rows

    def _insert_unknown(self, keys: Tensor, values: Tensor, buckets: Tensor) -> None:
        if len(keys) == 0:
            return
        order = torch.sort(values, descending=True, stable=True).indices
        order = order[torch.sort(buckets[order], stable=True).indices]
        keys, values, buckets = keys[order].to(self.keys.dtype), values[order], buckets[order]
        _, group, counts = torch.unique_consecutive(buckets, return_inverse=True, return_counts=True)
        rank = torch.arange(len(keys), device=keys.device) - (counts.cumsum(0) - counts)[group]
        # Slots fill from the first to the last, and are never emptied.
        slot = (self.keys[buckets] >= 0).sum(dim=1) + rank
        fits = slot < _SLOTS
        self.keys[buckets[fits], slot[fits]] = keys[fits]
        self.scores[buckets[fits], slot[fits]] = values[fits]
        keys, values, buckets = keys[~fits], values[~fits], buckets[~fits]
        if len(keys) == 0:
            return
        full, counts = torch.unique_consecutive(buckets, return_counts=True)
        strongest = keys[counts.cumsum(0) - counts]
        total = torch.segment_reduce(values, "sum", lengths=counts)
        cold = torch.where(self.hot_rows[full] < 0, self.scores[full], torch.inf)
        lowest, victim = cold.min(dim=1)
        open_ = lowest < torch.inf
        full, victim = full[open_], victim[open_]
        self.keys[full, victim] = strongest[open_]
        self.scores[full, victim] += total[open_]

    def _decay(self) -> None:
        self.scores *= self.decay
        self.hot_rows.masked_fill_(self.scores < self.threshold, -1)
        self.inserted.zero_()

    def _used_rows(self) -> Tensor:
        """(H,) which hot rows are taken; follows from ``hot_rows``, and is kept until somebody else writes those."""
        if self._used_of != (id(self.hot_rows), self.hot_rows._version):
            self._used = torch.zeros(self.num_rows, dtype=torch.bool, device=self.hot_rows.device)
            self._used[self.hot_rows[self.hot_rows >= 0].to(torch.int64)] = True
        return self._used


class Cafe(CompressedTables):
    """Gives a hot id a row of its own, any other id a row shared by hash.

    A sketch scores ids by the gradients of their vectors. One whose score passes ``threshold`` takes a free hot row,
    which starts as a copy of its hashed row; scores decay, and an id that falls below goes back to its hashed row.
    The sketch moves in ``after_step`` of the training loop only, by the gradients of the last backward in training
    mode; over several ranks it counts the batches of all, and is the same everywhere.

    Memory: ``embedding_dim * 4`` bytes for every hashed and hot row, and for every hot row 48 bytes of sketch (64 for
    more than 2**31 ids in all, or unbounded ones): scores too, which serving could do without.

    Args:
        tables: the logical tables; ids may be unbounded 64-bit hashes.
        num_embeddings: bytes of rows and sketch, counted in rows of ``embedding_dim``; what a byte budget turns.
        hash_fraction: of them that are hashed rows. The paper's for Criteo: 0.7 at 2x, 0.5 to 20x, 0.3 to 100x, 0.2
            to 1,000x, 0.1 beyond.
        threshold: score of a hot id, about the number of times an id of average gradient is seen. The paper's for
            Criteo: 10 to 5x, 20 at 10x, 30 at 20x, 50 at 50x, 100 at 100x, 200 at 200x, 500 beyond.
        decay: factor of all scores, each time ten thresholds a bucket have been counted.
        score: ``"gradient_norm"``, L2 norm of the gradient of a vector, scaled so that those of a feature average 1 in
            a batch; or ``"frequency"``.

    Raises:
        ValueError: fewer than one row, fractions outside (0, 1), a threshold not above 0, an unknown score.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> Cafe(tables, num_embeddings=10_000)
        Cafe(...)
    """

    budget_knob: ClassVar[str | None] = "num_embeddings"
    supports_unbounded: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_embeddings: int,
        hash_fraction: float = 0.5,
        threshold: float = 20.0,
        decay: float = 0.99,
        score: str = "gradient_norm",
    ) -> None:
        _check(num_embeddings, hash_fraction, threshold, decay, score)
        hashed_share = int(num_embeddings * hash_fraction)
        rows = proportional_rows(tables, max(hashed_share, 1))
        is_full = [count == table.num_embeddings for count, table in zip(rows, tables, strict=True)]
        sizes = [table.num_embeddings for table in tables]
        key_dtype = torch.int32 if sum(sizes) < 2**31 else torch.int64
        row_bytes = tables[0].embedding_dim * 4
        worth = (num_embeddings - hashed_share) * row_bytes
        num_hot = 0 if all(is_full) else max(worth // (row_bytes + HotSketch.bytes_per_row(key_dtype)), 1)
        ranges, variances = list(rows), [start_variance(table) for table in tables]
        if num_hot:
            ranges.append(num_hot)
            variances.append(full_table_variance(tables))
        super().__init__(tables, [[stacked_table("cafe", ranges, tables[0].embedding_dim, variances)]])
        self._first_hot = sum(rows)
        self._counts_gradients = score == "gradient_norm"
        self._rows = HashedRows(
            tables,
            [count if full else 0 for count, full in zip(rows, is_full, strict=True)],
            [0 if full else count for count, full in zip(rows, is_full, strict=True)],
        )
        self.sketch = HotSketch(num_hot, key_dtype=key_dtype, threshold=threshold, decay=decay) if num_hot else None
        # Keys tell ids of all tables apart: counted through where that is possible, else scrambled to 63 bits.
        self._scrambles = max(sizes) == UNBOUNDED
        self.key_constants: Tensor
        starts = [salt(table.name, 0, 0) for table in tables] if self._scrambles else first_rows(sizes)
        self.register_buffer("key_constants", per_feature(tables, starts))
        self._is_sketched: Tensor
        self.register_buffer("_is_sketched", per_feature(tables, [int(not full) for full in is_full]), persistent=False)
        self._observed: tuple[Tensor, Tensor, Tensor] | None = None

    def embed(self, bags: Bags) -> Tensor:
        features = features_of_ids(bags)
        slots = self._rows(bags.ids, features)
        if self.sketch is not None:
            hot = self.sketch.find(self._keys(bags.ids, features))
            slots = torch.where(hot >= 0, hot + self._first_hot, slots)
        vectors = self.lookup_rows(0, [slots.view(-1)])[0]
        if self.sketch is not None and self.training and torch.is_grad_enabled() and vectors.requires_grad:
            vectors.register_hook(lambda gradient: self._observe(bags, gradient))
        return vectors

    def _keys(self, ids: Tensor, features: Tensor | None) -> Tensor:
        constants = at_features(self.key_constants, features)
        if self._scrambles:
            return mix(ids, constants).bitwise_and_(2**63 - 1)
        return ids + constants

    @torch.no_grad()
    def _observe(self, bags: Bags, gradient: Tensor) -> None:
        """Keep ids, features and scores of the batch until the step is done and rows have moved."""
        features = features_of_ids(bags)
        if features is None:
            features = torch.arange(bags.num_features, device=bags.ids.device).expand(bags.ids.shape).reshape(-1)
        if self._counts_gradients:
            scores = torch.linalg.vector_norm(gradient.float(), dim=1)
        else:
            scores = torch.ones(len(gradient), device=gradient.device)
        self._observed = (bags.ids.view(-1), features, scores)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Count the batch, give hot rows to ids that have become hot and take them from those that are no more."""
        if self.sketch is None:
            return
        nothing = self.key_constants[:0]
        ids, features, scores = self._observed or (nothing, nothing, nothing.float())
        self._observed = None
        sketched = self._is_sketched[features] > 0
        ids, features, scores = ids[sketched], features[sketched], scores[sketched]
        num_features = len(self._is_sketched)
        counts = torch.bincount(features, minlength=num_features).double()
        sums = torch.zeros_like(counts).index_add_(0, features, scores.double())
        if dist.is_initialized() and dist.get_world_size() > 1:
            # The sums are those of each rank on every rank, so that all ranks round alike.
            totals = _gather(torch.stack([counts, sums]).unsqueeze(0)).sum(dim=0)
            (counts, sums), gathered = totals, _gather(torch.stack([ids, features], dim=1))
            (ids, features), scores = gathered.unbind(dim=1), _gather(scores)
        if len(ids) == 0:
            return
        if self._counts_gradients:
            # A feature's scores average 1, whatever the scale of the loss.
            scale = torch.where(sums > 0, counts / sums, torch.zeros_like(sums))
            scores = (scores * scale[features]).float()
        keys, order = torch.sort(self._keys(ids, features), stable=True)
        distinct, lengths = torch.unique_consecutive(keys, return_counts=True)
        values = torch.segment_reduce(scores[order], "sum", lengths=lengths)
        promoted, hot = self.sketch.insert(distinct, values)
        if len(promoted):
            # Hot rows start as what their ids read until now.
            first = order[(lengths.cumsum(0) - lengths)[promoted]]
            hashed = self._rows(ids[first], features[first])
            write_rows(self, 0, hot + self._first_hot, read_rows(self, 0, hashed))

    @torch.no_grad()
    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every bounded table: exactly where it stays full, else a hashed row starts at the mean of its ids' rows."""
        weight = self.get_parameter("lookups.0.embedding_bags.cafe.weight")
        rows, values, seeded, feature = [], [], [], 0
        for table in self.tables:
            if table.num_embeddings < UNBOUNDED:
                ids = torch.arange(table.num_embeddings, device=weight.device)
                rows.append(self._rows(ids, torch.full_like(ids, feature)))
                values.append(full_tables[table.name].to(weight.device, torch.float32))
                seeded.append(table.name)
            feature += len(table.feature_names)
        if seeded:
            means, has_ids = means_per_row(len(weight), torch.cat(rows), torch.cat(values))
            weight.copy_(torch.where(has_ids.unsqueeze(1), means, weight))
        return seeded

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        return proportional_range(tables)


def _gather(rows: Tensor) -> Tensor:
    """The tensors of all ranks, which differ in their first dimension, one after the other."""
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    counts = [int(count) for count in sizes]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _check(num_embeddings: int, hash_fraction: float, threshold: float, decay: float, score: str) -> None:
    if num_embeddings < 1:
        raise ValueError(f"num_embeddings must be at least 1 row, got {num_embeddings}")
    if not 0 < hash_fraction < 1:
        raise ValueError(f"hash_fraction must be in (0, 1), got {hash_fraction}")
    if not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}")
    if score not in SCORES:
        raise ValueError(f"score must be one of {SCORES}, got {score!r}")
