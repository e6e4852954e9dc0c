"""Clustered compositional embeddings (CCE): a sketch of the table that is clustered again and again while it trains.

Reference: Tsang and Ahle, "Clustering the Sketch: Dynamic Compression for Embedding Tables", NeurIPS 2023,
arXiv:2210.05974.

Differs from the paper: the learnt maps count as bytes, one code an id and chunk, so compression ends where they do;
vectors start with the variance of a full table instead of 1 / (3 D); the second table takes a hash function, not a
stored random map; k-means starts from random samples and gives empty clusters the worst-fitting ones; a table that
would not shrink stays full. The released code hashes a block of ids anew for each block and divides by the number of
ids of a row, which may be none: here all ids of a clustering share one hash, and rows without ids become zero.

Shapes: N ids, B batch, F features, D embedding_dim, W chunk_dim, C = D / W chunks, K num_clusters.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.hashing import hash_to_slots, mix, salt
from recemb.k_means import k_means, nearest
from recemb.method import UNBOUNDED, CompressedTables
from recemb.stacked import first_rows, per_feature, stacked_table, start_variance
from recemb.table_rows import read_rows, write_rows

logger = logging.getLogger(__name__)

# Turns the salts of one generation into those of the next.
_NEXT_GENERATION = 0x632BE59BD9B4E019
# Ids whose vectors are in memory at once while every id is assigned to its cluster.
_BLOCK_IDS = 1 << 18


class ClusteredCompositional(CompressedTables):
    """Gives chunk ``c`` of id ``i`` the sum ``first[c][code[i, c]] + second[c][hash_c(i)]`` of two rows of W floats.

    Codes are stored, and start as a hash. ``cluster_`` replaces them: k-means over the current vectors of the ids, the
    nearest centroid as the code, the centroids as the first rows; the second rows hash anew and start at the mean of
    what is left over. So ids that behave alike come to share rows, and others can part again.

    Memory: ``2 * K * D * 4`` bytes a table, and a code of 1 byte (K up to 256), 2 (65,536) or 4 for every id and chunk:
    the codes alone end at ``4 * W`` times smaller than full tables. Between the largest size with codes of one byte and
    the smallest with two lies nothing, however a budget asks for it. Tables that this does not shrink stay full.

    Args:
        tables: the logical tables, of bounded ids.
        num_clusters: K, the same for every table; what a byte budget turns. Whole powers (256, 65,536) use their
            codes up.
        chunk_dim: W in floats, a multiple of 4 that divides embedding_dim. 4 (four chunks of 16, as in the paper)
            shares rows most finely; more for higher compression, as codes take ``D / W`` times their bytes.
        cluster_at_steps: training steps after which to cluster (the paper: ends of epochs). A clustering makes up to 26
            passes over the ids of every chunk, each of some 2 us an id on CPU where chunks are of 4 and K is large, and
            of ``K * W`` multiply-adds an id elsewhere; the rows need some steps after the last one.
        samples_per_cluster: ids that k-means looks at, in multiples of K.
        seed: changes every hash and every sample at once.

    Raises:
        ValueError: num_clusters or samples_per_cluster below 1, a chunk_dim that does not divide embedding_dim or is
            no multiple of 4, a step below 1.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**5, embedding_dim=16, feature_names=["ad"])]
        >>> ClusteredCompositional(tables, num_clusters=256, cluster_at_steps=[1000, 5000])
        ClusteredCompositional(...)
    """

    budget_knob: ClassVar[str | None] = "num_clusters"
    merges_ids: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_clusters: int,
        chunk_dim: int = 4,
        cluster_at_steps: Sequence[int] = (),
        samples_per_cluster: int = 200,
        seed: int = 0,
    ) -> None:
        dim = tables[0].embedding_dim
        _check(dim, num_clusters, chunk_dim, cluster_at_steps, samples_per_cluster)
        chunks = dim // chunk_dim
        dtype = _code_dtype(num_clusters)
        shrinks = [_shrinks(table, num_clusters, chunks, dtype) for table in tables]
        rows = [
            chunks * (num_clusters if small else table.num_embeddings)
            for small, table in zip(shrinks, tables, strict=True)
        ]
        variances = [start_variance(table) / (2 if small else 1) for small, table in zip(shrinks, tables, strict=True)]
        second = [(count, variance) for count, variance, small in zip(rows, variances, shrinks, strict=True) if small]
        lookups = [[stacked_table("cce_first", rows, chunk_dim, variances)]]
        if second:
            counts, spreads = zip(*second, strict=True)
            lookups.append([stacked_table("cce_second", counts, chunk_dim, spreads)])
        super().__init__(tables, lookups)
        self.num_clusters = num_clusters
        self._chunks = chunks
        self._shrinks = shrinks
        self._cluster_at_steps = frozenset(cluster_at_steps)
        self._samples = samples_per_cluster * num_clusters
        self._has_full = not all(shrinks)
        self._register_maps(rows, dtype, seed)

    def _register_maps(self, rows: Sequence[int], dtype: torch.dtype, seed: int) -> None:
        """Everything that serving needs besides rows is saved, and counted in the model's bytes."""
        tables, shrinks, chunks = self.tables, self._shrinks, self._chunks
        sizes = [table.num_embeddings if small else 0 for table, small in zip(tables, shrinks, strict=True)]
        second = [count if small else 0 for count, small in zip(rows, shrinks, strict=True)]
        chunk = torch.arange(chunks)
        stride = per_feature(tables, [self.num_clusters if small else 1 for small in shrinks]).unsqueeze(1)
        self.first_rows: Tensor
        self.register_buffer("first_rows", per_feature(tables, first_rows(rows)).unsqueeze(1) + chunk * stride)
        self.second_rows: Tensor
        self.register_buffer("second_rows", per_feature(tables, first_rows(second)).unsqueeze(1) + chunk * stride)
        self.first_codes: Tensor
        self.register_buffer("first_codes", per_feature(tables, first_rows(sizes)))
        self.salts: Tensor
        salts = [
            [salt(t.name, chunks + number, seed) for number in range(chunks)] for t in tables for _ in t.feature_names
        ]
        self.register_buffer("salts", torch.tensor(salts))
        self.codes: Tensor
        self.register_buffer("codes", torch.empty(sum(sizes), chunks, dtype=dtype))
        if not self.codes.is_meta:
            for table, start, size in zip(tables, first_rows(sizes), sizes, strict=True):
                first = torch.tensor([salt(table.name, number, seed) for number in range(chunks)])
                for ids in torch.arange(size).split(_BLOCK_IDS):
                    self.codes[start + ids] = hash_to_slots(ids.unsqueeze(1), first, self.num_clusters).to(dtype)
        # 16-bit codes use the sign bit too, as torch has few operations on unsigned integers.
        self._code_mask = (1 << (8 * self.codes.element_size())) - 1
        self._is_clustered: Tensor
        self.register_buffer("_is_clustered", per_feature(tables, [int(small) for small in shrinks]), persistent=False)
        clustered = [index for index, flag in enumerate(self._flags()) if flag]
        self._clustered: Tensor
        self.register_buffer("_clustered", torch.tensor(clustered, dtype=torch.int64), persistent=False)

    def _flags(self) -> list[bool]:
        return [small for table, small in zip(self.tables, self._shrinks, strict=True) for _ in table.feature_names]

    def embed_each(self, bags: Bags) -> Tensor:
        features = None if bags.single else bags.per_id(torch.arange(bags.num_features, device=bags.ids.device))
        first = self.lookup_rows(0, [self._first_slots(bags.ids, features).view(-1)])[0]
        dim = self.tables[0].embedding_dim
        vectors = first.view(*bags.ids.shape, dim)
        if len(self.lookups) > 1:
            ids, salts, starts, positions = bags.ids, self.salts, self.second_rows, None
            if features is not None:
                positions = None if not self._has_full else self._is_clustered[features].nonzero().view(-1)
                if positions is not None:
                    ids, features = ids.index_select(0, positions), features.index_select(0, positions)
                salts, starts = salts.index_select(0, features), starts.index_select(0, features)
            elif self._has_full:
                positions = self._clustered
                ids, salts, starts = ids.index_select(1, positions), salts[positions], starts[positions]
            slots = hash_to_slots(ids.unsqueeze(-1), salts, self.num_clusters) + starts
            second = self.lookup_rows(1, [slots.view(-1)])[0].view(*ids.shape, dim)
            axis = 1 if features is None else 0
            vectors = vectors + second if positions is None else vectors.index_add(axis, positions, second)
        return vectors.view(bags.ids.numel(), dim)

    def _first_slots(self, ids: Tensor, features: Tensor | None) -> Tensor:
        """Rows of the first table: ids' shape with C behind."""

        def at(constants: Tensor) -> Tensor:
            return constants if features is None else constants.index_select(0, features)

        own = (ids * self._chunks).unsqueeze(-1)
        if len(self.lookups) == 1:
            return own + at(self.first_rows)
        is_clustered = at(self._is_clustered)
        # Ids of full tables have no codes; they read those of some other id, which are not used.
        code_rows = ids * is_clustered + at(self.first_codes) * is_clustered
        codes = self.codes.index_select(0, code_rows.view(-1)).to(torch.int64).bitwise_and_(self._code_mask)
        codes = codes.view(*ids.shape, self._chunks)
        if self._has_full:
            codes = torch.where(is_clustered.unsqueeze(-1) > 0, codes, own)
        return codes + at(self.first_rows)

    def after_step(self, step: int) -> None:
        if step in self._cluster_at_steps:
            self.cluster_()

    @torch.no_grad()
    def cluster_(self) -> None:
        """Cluster every table once more, in place; deterministic, and the same on every rank.

        Optimizer state stays with the rows.
        """
        if len(self.lookups) == 1:
            return
        first, second = (self._read(index) for index in range(2))
        old_first, old_second, old_salts = first.clone(), second.clone(), self.salts.clone()

        def vectors(feature: int, chunk: int, ids: Tensor) -> Tensor:
            rows = self._codes_of(feature, chunk, ids) + self.first_rows[feature, chunk]
            hashed = hash_to_slots(ids, old_salts[feature, chunk], self.num_clusters) + self.second_rows[feature, chunk]
            return old_first[rows] + old_second[hashed]

        self._cluster(vectors, first, second)

    @torch.no_grad()
    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every table: exactly where it stays full, else by clustering the rows it had."""
        first = self._read(0)
        second = self._read(1) if len(self.lookups) > 1 else first[:0]
        names = [table.name for table in self.tables for _ in table.feature_names]
        width = first.shape[1]
        for feature, small in enumerate(self._flags()):
            if not small:
                start = int(self.first_rows[feature, 0])
                rows = full_tables[names[feature]].reshape(-1, width).to(first)
                first[start : start + len(rows)] = rows

        def vectors(feature: int, chunk: int, ids: Tensor) -> Tensor:
            table = full_tables[names[feature]]
            return table[ids.to(table.device), chunk * width : (chunk + 1) * width].to(first)

        self._cluster(vectors, first, second)
        return [table.name for table in self.tables]

    def _cluster(self, vectors: Callable[[int, int, Tensor], Tensor], first: Tensor, second: Tensor) -> None:
        """New codes, salts and rows from ``vectors(feature, chunk, ids) -> (N, W)``; writes all of them."""
        began = time.perf_counter()
        self.salts.copy_(mix(self.salts, torch.tensor(_NEXT_GENERATION, device=self.salts.device)))
        feature = 0
        for table, small in zip(self.tables, self._shrinks, strict=True):
            for chunk in range(self._chunks if small else 0):
                centroids, means = self._cluster_chunk(feature, chunk, table.num_embeddings, vectors)
                for target, starts, rows in ((first, self.first_rows, centroids), (second, self.second_rows, means)):
                    start = int(starts[feature, chunk])
                    target[start : start + self.num_clusters] = rows
            feature += len(table.feature_names)
        for index, rows in enumerate((first, second)[: len(self.lookups)]):
            write_rows(self, index, torch.arange(len(rows), device=rows.device), rows)
        logger.info("clustered %d tables in %.1f s", sum(self._shrinks), time.perf_counter() - began)

    def _cluster_chunk(
        self, feature: int, chunk: int, size: int, vectors: Callable[[int, int, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Clusters one chunk of one table's ids and sets its codes: ((K, W) centroids, (K, W) mean residuals)."""
        device = self.codes.device
        # Seeded by the model's state: the same on every rank, and in a run that is resumed.
        generator = torch.Generator().manual_seed(int(self.salts[feature, chunk]) & (2**63 - 1))
        if size > self._samples:
            sample = torch.randint(size, (self._samples,), generator=generator).to(device)
        else:
            sample = torch.arange(size, device=device)
        centroids = k_means(vectors(feature, chunk, sample), self.num_clusters, generator)
        sums, counts = torch.zeros_like(centroids), torch.zeros(self.num_clusters, device=device)
        for ids in torch.arange(size, device=device).split(_BLOCK_IDS):
            old = vectors(feature, chunk, ids)
            codes = nearest(old, centroids)[0]
            self.codes[int(self.first_codes[feature]) + ids, chunk] = codes.to(self.codes.dtype)
            slots = hash_to_slots(ids, self.salts[feature, chunk], self.num_clusters)
            sums.index_add_(0, slots, old - centroids[codes])
            counts += torch.bincount(slots, minlength=self.num_clusters)
        return centroids, sums / counts.clamp(min=1).unsqueeze(1)

    def _codes_of(self, feature: int, chunk: int, ids: Tensor) -> Tensor:
        return self.codes[int(self.first_codes[feature]) + ids, chunk].to(torch.int64) & self._code_mask

    def _read(self, index: int) -> Tensor:
        [config] = self.physical_tables[index]
        return read_rows(self, index, torch.arange(config.num_embeddings, device=self.salts.device))

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        bounded = [table.num_embeddings for table in tables if table.num_embeddings < UNBOUNDED]
        # Two tables of half the ids take as much as a full one.
        return 1, max(bounded, default=1) // 2 + 1


def _code_dtype(num_clusters: int) -> torch.dtype:
    return torch.uint8 if num_clusters <= 1 << 8 else torch.int16 if num_clusters <= 1 << 16 else torch.int32


def _shrinks(table: EmbeddingBagConfig, num_clusters: int, chunks: int, dtype: torch.dtype) -> bool:
    rows = 2 * num_clusters * table.embedding_dim * 4
    return rows + table.num_embeddings * chunks * dtype.itemsize < table.num_embeddings * table.embedding_dim * 4


def _check(
    dim: int, num_clusters: int, chunk_dim: int, cluster_at_steps: Sequence[int], samples_per_cluster: int
) -> None:
    if num_clusters < 1 or samples_per_cluster < 1:
        raise ValueError(
            f"num_clusters and samples_per_cluster must be at least 1, got {num_clusters} and {samples_per_cluster}"
        )
    if chunk_dim < 4 or chunk_dim % 4 or dim % chunk_dim:
        raise ValueError(f"chunk_dim must be a multiple of 4 that divides embedding_dim ({dim}), got {chunk_dim}")
    if early := [step for step in cluster_at_steps if step < 1]:
        raise ValueError(f"cluster_at_steps must be at least 1 (the first training step), got {early}")
