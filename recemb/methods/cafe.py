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
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.distinct import Distinct
from recemb.hashing import mix, salt
from recemb.hot_sketch import HotSketch
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


@dataclass(frozen=True)
class _Observed:
    """One batch as the sketch counts it.

    Args:
        bags: the N ids as they came.
        scores: (N,) float32 score of each.
        distinct: how ``ids`` were merged, None where they were not.
        ids: the distinct ids, or ``bags``.
        keys: (U,) int64 key of each of those.
    """

    bags: Bags
    scores: Tensor
    distinct: Distinct | None
    ids: Bags
    keys: Tensor

    def totals(self) -> Tensor:
        """(2, F) float64: number and sum of the scores of each feature."""
        counts = self.bags.lengths.sum(dim=1)
        if self.bags.single:
            sums = self.scores.view(self.bags.batch_size, -1).sum(dim=0, dtype=torch.float64)
        else:
            sums = torch.segment_reduce(self.scores.double(), "sum", lengths=counts, initial=0)
        return torch.stack([counts.double(), sums])

    def features(self) -> Tensor:
        """(U,) int64 feature of each id."""
        features = features_of_ids(self.ids)
        if features is None:
            features = torch.arange(self.ids.num_features, device=self.keys.device).repeat(self.ids.batch_size)
        return features

    def values(self, scale: Tensor | None) -> Tensor:
        """(U,) float32: scores, times the (F,) scale of their features, summed by id."""
        scores = self.scores
        if scale is not None:
            scores = (scores.view(self.bags.ids.shape) * self.bags.per_id(scale)).float().view(-1)
        if self.distinct is None:
            return scores
        return torch.segment_reduce(scores[self.distinct.order], "sum", lengths=self.distinct.counts, unsafe=True)


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
        full_below_rows: tables of fewer rows stay full, on top of ``num_embeddings``. The collection's argument of this
            name does the same, but puts them in a group of their own, whose vectors are then copied into their places:
            at 64 values a vector a third of a step.

    Raises:
        ValueError: fewer than one row, fractions outside (0, 1), a threshold not above 0, an unknown score.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> Cafe(tables, num_embeddings=10_000)
        Cafe(...)
    """

    budget_knob: ClassVar[str | None] = "num_embeddings"
    supports_unbounded: ClassVar[bool] = True
    merges_ids: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_embeddings: int,
        hash_fraction: float = 0.5,
        threshold: float = 20.0,
        decay: float = 0.99,
        score: str = "gradient_norm",
        full_below_rows: int = 0,
    ) -> None:
        _check(num_embeddings, hash_fraction, threshold, decay, score)
        hashed_share = int(num_embeddings * hash_fraction)
        rows = [
            table.num_embeddings if table.num_embeddings < full_below_rows else share
            for table, share in zip(tables, proportional_rows(tables, max(hashed_share, 1)), strict=True)
        ]
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
        self._observed: _Observed | None = None

    def embed(self, bags: Bags) -> Tensor:
        merged = self._distinct_ids.merge(bags) if self._distinct_ids is not None else None
        distinct, chosen = merged or (None, bags)
        features = features_of_ids(chosen)
        slots = self._rows(chosen.ids, features)
        keys = slots[:0]
        if self.sketch is not None:
            keys = self._keys(chosen.ids, features)
            hot = self.sketch.find(keys)
            slots = torch.where(hot >= 0, hot + self._first_hot, slots)
        vectors = self.lookup_rows(0, [slots.view(-1)])[0]
        if distinct is not None:
            vectors = distinct.expand(vectors)
        if self.sketch is not None and self.training and torch.is_grad_enabled() and vectors.requires_grad:
            vectors.register_hook(lambda gradient: self._observe(bags, distinct, chosen, keys, gradient))
        return vectors

    def _keys(self, ids: Tensor, features: Tensor | None) -> Tensor:
        constants = at_features(self.key_constants, features)
        if self._scrambles:
            return mix(ids, constants).bitwise_and_(2**63 - 1)
        return ids + constants

    @torch.no_grad()
    def _observe(self, bags: Bags, distinct: Distinct | None, chosen: Bags, keys: Tensor, gradient: Tensor) -> None:
        """Keep ids and scores of the batch until the step is done and rows have moved."""
        if self._counts_gradients:
            scores = torch.linalg.vector_norm(gradient.float(), dim=1)
        else:
            scores = torch.ones(len(gradient), device=gradient.device)
        self._observed = _Observed(bags, scores, distinct, chosen, keys.view(-1))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Count the batch, give hot rows to ids that have become hot and take them from those that are no more."""
        if self.sketch is None:
            return
        observed, self._observed = self._observed, None
        num_features = len(self._is_sketched)
        totals = torch.zeros(2, num_features, dtype=torch.float64, device=self._is_sketched.device)
        if observed is not None:
            totals = observed.totals()
        over_ranks = dist.is_initialized() and dist.get_world_size() > 1
        if over_ranks:
            # The sums are those of each rank on every rank, so that all ranks round alike.
            totals = _gather(totals.unsqueeze(0)).sum(dim=0)
        counts, sums = totals
        # A feature's scores average 1, whatever the scale of the loss.
        scale = torch.where(sums > 0, counts / sums, torch.zeros_like(sums)) if self._counts_gradients else None
        nothing = self.key_constants[:0]
        keys, ids, features, values = nothing, nothing, nothing, nothing.float()
        if observed is not None:
            features = observed.features()
            sketched = (self._is_sketched.index_select(0, features) > 0).nonzero().view(-1)
            columns = (observed.keys, observed.ids.ids.reshape(-1), features, observed.values(scale))
            keys, ids, features, values = (column.index_select(0, sketched) for column in columns)
        if over_ranks:
            keys, ids, features = _gather(torch.stack([keys, ids, features], dim=1)).unbind(dim=1)
            values = _gather(values)
        if len(keys) == 0:
            return
        if bool((keys.diff() <= 0).any()):
            keys, order = torch.sort(keys, stable=True)
            keys, lengths = torch.unique_consecutive(keys, return_counts=True)
            values = torch.segment_reduce(values[order], "sum", lengths=lengths)
            first = order[lengths.cumsum(0) - lengths]
            ids, features = ids[first], features[first]
        promoted, hot = self.sketch.insert(keys, values)
        if len(promoted):
            # Hot rows start as what their ids read until now.
            hashed = self._rows(ids[promoted], features[promoted])
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
