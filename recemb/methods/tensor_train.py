"""TT-Rec: a table as the product of three small cores (tensor-train decomposition).

Reference: Yin et al., "TT-Rec: Tensor Train Compression for Deep Learning Recommendation Models", MLSys 2021,
arXiv:2101.11714.

Differs from the paper: the same ranks for all tables; no cache of frequent rows beside the cores, but the
vector of an id is composed once a batch however often it comes; the scale of the sampled Gaussian counts the rank, so
that vectors start with the variance of a full table at every rank.

Shapes: N ids, U distinct ids of the batch, T tables, D = d1 * d2 * d3 embedding_dim, R and S ranks, n_k rows of
core k with n1 * n2 * n3 >= num_embeddings.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.bags import Bags
from recemb.distinct import Distinct
from recemb.grouped_linear import grouped_linear
from recemb.method import WIDEST_ROW, CompressedTables, physical_table
from recemb.stacked import first_rows, per_feature, stacked_table, start_variance

# The sampled Gaussian keeps draws at least this far from 0, in standard deviations.
_CUT = 2.0
# Floats of middle rows that pairs read, for each distinct row: from here on a product for each distinct row takes less
# time on CPU than a copy of the row for every pair.
_GROUP_FROM = 1 << 13


@dataclass(frozen=True)
class _Places:
    """Where the cores of a batch's distinct ids are.

    Args:
        slots: of each lookup.
        pairs: the pairs (i1, i2) of the ids of decomposed tables, in the order of their middle rows; None without any.
        pairs_of_core: how many of the pairs each of the middle rows has that are looked up; None where it is looked up
            for every pair.
    """

    slots: list[list[Tensor]]
    pairs: Distinct | None
    pairs_of_core: list[int] | None


class TensorTrain(CompressedTables):
    """Gives id ``i`` the product ``A[i1] B[i2] C[i3]`` of a (d1, R), an (R, d2 * S) and an (S, d3) matrix.

    ``i = (i1 * n2 + i2) * n3 + i3``, so every id has a triple of its own; ids share each of their matrices with others.

    Memory: ``(n1 * d1 * R + n2 * d2 * R * S + n3 * d3 * S) * 4`` bytes a table, rows rounded up to multiples of 4
    floats; a table stays full where that is not less. n_k are near the cube root of num_embeddings, d_k near that of
    embedding_dim with the smallest in the middle, where it counts most.

    Args:
        tables: the logical tables.
        rank: R = S. A step takes time in proportion to R * S: the paper uses 8 to 64.
        num_parameters: floats of cores and full tables in all, instead of rank; what a byte budget turns. Among pairs
            of nearly equal ranks R and S the one that comes nearest is taken. Ranks whose middle rows of ``d2 * R * S``
            floats exceed ``recemb.method.WIDEST_ROW`` (about 90 at embedding_dim 16) are not, so a budget that would
            pay for more is not used up.
        merge_ids: compose each distinct id of a batch once, and on CPU read each distinct middle row once where rows
            are large. False composes every id by itself, with the same result; for measuring what merging saves.

    Raises:
        ValueError: both or neither of rank and num_parameters, one of them below 1, or a rank of too wide rows.

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> TensorTrain(tables, rank=8)
        TensorTrain(...)
    """

    budget_knob: ClassVar[str | None] = "num_parameters"

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        rank: int | None = None,
        num_parameters: int | None = None,
        merge_ids: bool = True,
    ) -> None:
        if (rank is None) == (num_parameters is None):
            raise ValueError(
                f"TensorTrain: give rank or a budget (num_parameters), one of them; "
                f"got rank={rank}, num_parameters={num_parameters}"
            )
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        dim = tables[0].embedding_dim
        sizes = tuple(table.num_embeddings for table in tables)
        self.ranks = (rank, rank) if rank is not None else choose_ranks(sizes, dim, num_parameters or 0)
        self.column_factors = factorise_columns(dim)
        d1, d2, d3 = self.column_factors
        first_rank, second_rank = self.ranks
        self.core_shapes = ((d1, first_rank), (first_rank, d2 * second_rank), (second_rank, d3))
        row_factors = {table.name: factorise_rows(table.num_embeddings) for table in tables}
        pays = [
            _core_floats(row_factors[table.name], self.column_factors, self.ranks) < table.num_embeddings * dim
            for table in tables
        ]
        self.decomposed = [table for table, yes in zip(tables, pays, strict=True) if yes]
        self.full = [table for table, yes in zip(tables, pays, strict=True) if not yes]
        factors = [row_factors[table.name] for table in self.decomposed]
        super().__init__(tables, self._lookups(factors, dim))
        self.merge_ids = merge_ids
        # Ids are counted through all tables, decomposed ones first, so that sorted ids are the two kinds one by one.
        ordered = [*self.decomposed, *self.full]
        starts = first_rows([table.num_embeddings for table in ordered])
        start_of = {table.name: start for table, start in zip(ordered, starts, strict=True)}
        self._num_ids = sum(table.num_embeddings for table in tables)
        self._num_decomposed_ids = sum(table.num_embeddings for table in self.decomposed)
        self.starts: Tensor
        self.register_buffer("starts", per_feature(tables, [start_of[table.name] for table in tables]))
        # (T, 7) of decomposed tables: first id, n3, first pair (i1, i2), n2, first rows in the three cores.
        firsts = zip(*[first_rows(rows) for rows in zip(*factors, strict=True)], strict=True)
        pairs = [n1 * n2 for n1, n2, _ in factors]
        rows = [
            [start_of[table.name], n3, first_pair, n2, *first]
            for table, (_, n2, n3), first_pair, first in zip(
                self.decomposed, factors, first_rows(pairs), firsts, strict=False
            )
        ]
        self._num_pairs = sum(pairs)
        self.splits: Tensor
        self.register_buffer("splits", torch.tensor(rows, dtype=torch.int64).view(-1, 7))
        self._n1: Tensor
        self.register_buffer("_n1", torch.tensor([n1 for n1, _, _ in factors], dtype=torch.int64), persistent=False)

    def _lookups(self, factors: Sequence[tuple[int, int, int]], dim: int) -> list[list[EmbeddingBagConfig]]:
        lookups = []
        for number, rows in enumerate(zip(*factors, strict=True)):
            # An element is a sum of R * S products of three draws.
            deviations = [(start_variance(table) / math.prod(self.ranks)) ** (1 / 6) for table in self.decomposed]
            init = functools.partial(_fill_sampled_gaussian, list(zip(rows, deviations, strict=True)))
            width = _stored_width(math.prod(self.core_shapes[number]))
            lookups.append([physical_table(f"tensor_train__{number}", sum(rows), width, init)])
        if self.full:
            sizes = [table.num_embeddings for table in self.full]
            variances = [start_variance(table) for table in self.full]
            lookups.append([stacked_table("tensor_train__full", sizes, dim, variances)])
        return lookups

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        """Rows of the first core for distinct pairs (i1, i2), of the second for them or for distinct i2, of the third
        and of full tables for distinct ids.
        """
        return self._places(self._distinct(bags).keys).slots

    def embed(self, bags: Bags) -> Tensor:
        distinct = self._distinct(bags)
        places = self._places(distinct.keys)
        rows = [self.lookup_rows(index, slot)[0] for index, slot in enumerate(places.slots)]
        full = [rows.pop()] if self.full else []
        composed = [] if places.pairs is None else [self._compose_cores(rows, places.pairs, places.pairs_of_core)]
        return distinct.expand(torch.cat([*composed, *full]))

    def _distinct(self, bags: Bags) -> Distinct:
        ids = bags.ids + bags.per_id(self.starts)
        return Distinct.of(ids.view(-1), self._num_ids, merge=self.merge_ids)

    def _places(self, ids: Tensor) -> _Places:
        """Of ascending ids counted through all tables."""
        boundary = int(torch.searchsorted(ids, self._num_decomposed_ids))
        full = [[ids[boundary:] - self._num_decomposed_ids]] if self.full else []
        if not self.decomposed:
            return _Places(full, None, None)
        inside = ids[:boundary]
        table = torch.searchsorted(self.splits[:, 0].contiguous(), inside, right=True) - 1
        first, n3, first_pair, n2, _, _, start_3 = self.splits.index_select(0, table).unbind(1)
        inside = inside - first
        # Integer division: floats would misplace ids above 2**24.
        pair = torch.div(inside, n3, rounding_mode="floor")
        slots_3 = inside - pair * n3 + start_3
        index_1 = torch.div(pair, n2, rounding_mode="floor")
        # n3 ids that follow each other share a pair. Pairs are numbered with i2 first, so that those of a middle row,
        # the large ones, lie side by side.
        number = (pair - index_1 * n2) * self._n1.index_select(0, table) + index_1
        pairs = Distinct.of(number + first_pair, self._num_pairs, merge=self.merge_ids)
        table = torch.searchsorted(self.splits[:, 2].contiguous(), pairs.keys, right=True) - 1
        _, _, first_pair, _, start_1, start_2, _ = self.splits.index_select(0, table).unbind(1)
        number, n1 = pairs.keys - first_pair, self._n1.index_select(0, table)
        index_2 = torch.div(number, n1, rounding_mode="floor")
        slots_1, slots_2 = number - index_2 * n1 + start_1, index_2 + start_2
        pairs_of_core = None
        if self.merge_ids and slots_2.device.type == "cpu":
            cores, counts = torch.unique_consecutive(slots_2, return_counts=True)
            if slots_2.numel() * math.prod(self.core_shapes[1]) > _GROUP_FROM * cores.numel():
                slots_2, pairs_of_core = cores, counts.tolist()
        return _Places([[slots_1], [slots_2], [slots_3], *full], pairs, pairs_of_core)

    def _compose_cores(self, rows: Sequence[Tensor], pairs: Distinct, pairs_of_core: Sequence[int] | None) -> Tensor:
        """Rows of the cores, see ``_Places`` -> (U, D)."""
        d1, d2, _ = self.column_factors
        first, second, third = (
            row[:, : shape[0] * shape[1]].reshape(-1, *shape) for row, shape in zip(rows, self.core_shapes, strict=True)
        )
        if pairs_of_core is None:
            left = torch.bmm(first, second)
        else:
            left = grouped_linear(first.flatten(0, 1), second, None, [count * d1 for count in pairs_of_core])
        left = pairs.expand(left.view(-1, d1 * d2 * self.ranks[1])).view(-1, d1 * d2, self.ranks[1])
        return torch.bmm(left, third).flatten(1)

    @torch.no_grad()
    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Every table: full ones exactly, the others by their tensor-train SVD of these ranks."""
        weights = [
            self.get_parameter(f"lookups.{index}.embedding_bags.{group[0].name}.weight")
            for index, group in enumerate(self.physical_tables)
        ]
        start = 0
        for table in self.full:
            weights[-1][start : start + table.num_embeddings].copy_(full_tables[table.name])
            start += table.num_embeddings
        for table, split in zip(self.decomposed, self.splits.tolist(), strict=True):
            rows = full_tables[table.name].to(weights[0].device, torch.float32)
            cores = tensor_train_svd(rows, factorise_rows(table.num_embeddings), self.column_factors, self.ranks)
            for weight, first, core in zip(weights, split[4:], cores, strict=False):
                weight[first : first + core.shape[0], : core.shape[1]].copy_(core)
        return [table.name for table in self.tables]

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        return 1, sum(table.num_embeddings * table.embedding_dim for table in tables)


def factorise_columns(dim: int) -> tuple[int, int, int]:
    """d1 * d2 * d3 = dim as equal as possible, d2 the smallest and d1 <= d3: 16 -> (2, 2, 4), 64 -> (4, 4, 4)."""
    divisors = [number for number in range(1, dim + 1) if dim % number == 0]
    triples = ((a, b, dim // (a * b)) for a, b in itertools.product(divisors, divisors) if dim % (a * b) == 0)
    smallest, middle, largest = min((tuple(sorted(triple)) for triple in triples), key=sum)
    return middle, smallest, largest


def factorise_rows(num_embeddings: int) -> tuple[int, int, int]:
    """n1 * n2 * n3 >= num_embeddings with n1 <= n2 <= n3 or nearly so: 10,131,227 -> (216, 217, 217)."""
    n3 = round(num_embeddings ** (1 / 3))
    # The power is a float: put right by integers.
    n3 += n3**3 < num_embeddings
    rest = -(-num_embeddings // n3)
    n2 = math.isqrt(rest - 1) + 1
    return -(-rest // n2), n2, n3


def choose_ranks(sizes: tuple[int, ...], dim: int, num_parameters: int) -> tuple[int, int]:
    """The ranks of two bonds, nearly equal, with which tables take the most floats up to ``num_parameters``.

    Args:
        sizes: num_embeddings of the tables.
        dim: embedding_dim.
        num_parameters: floats of cores and of the tables that they would not make smaller.
    """
    if num_parameters < 1:
        raise ValueError(f"num_parameters must be at least 1 float, got {num_parameters}")
    ranks, floats = _pairs_of_ranks(sizes, dim)
    fits = floats <= num_parameters
    # Of equal sizes the most equal ranks come first. Where even the least does not fit, it is the answer all the same.
    best = int(np.argmax(np.where(fits, floats, -1))) if fits.any() else int(np.argmin(floats))
    return int(ranks[best, 0]), int(ranks[best, 1])


@functools.lru_cache(maxsize=16)
def _pairs_of_ranks(sizes: tuple[int, ...], dim: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(P, 2) ranks that differ by a quarter and 2 at most, and (P,) floats that all tables take with them."""
    d1, d2, d3 = factorise_columns(dim)
    # From the rank on at which the middle core alone is as large as the table, all tables stay full.
    largest = max(math.isqrt(size * dim // (factorise_rows(size)[1] * d2)) + 1 for size in sizes)
    pairs = [
        (first, second)
        for first in range(1, largest + 1)
        for second in range(max(1, first - 2 - first // 4), min(largest, first + 2 + first // 4) + 1)
    ]
    ranks = np.array(sorted(pairs, key=lambda pair: abs(pair[0] - pair[1])), dtype=np.int64)
    ranks = ranks[d2 * ranks[:, 0] * ranks[:, 1] <= WIDEST_ROW]
    first, second = ranks.T
    widths = [-(-width // 4) * 4 for width in (d1 * first, first * d2 * second, second * d3)]
    floats = np.zeros(len(ranks), np.int64)
    for size in sizes:
        cores = sum(rows * width for rows, width in zip(factorise_rows(size), widths, strict=True))
        floats += np.minimum(cores, size * dim)
    return ranks, floats


def tensor_train_svd(
    rows: Tensor, row_factors: tuple[int, int, int], column_factors: tuple[int, int, int], ranks: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Cores whose products approximate (n, D) ``rows``, exactly where the ranks allow; each (n_k, floats)."""
    n1, n2, n3 = row_factors
    d1, d2, d3 = column_factors
    padded = torch.nn.functional.pad(rows, (0, 0, 0, n1 * n2 * n3 - rows.shape[0]))
    tensor = padded.view(n1, n2, n3, d1, d2, d3).permute(0, 3, 1, 4, 2, 5).reshape(n1 * d1, -1)
    left = _leading(tensor @ tensor.T, ranks[0])
    rest = (left.T @ tensor).reshape(-1, n3 * d3)
    right = _leading(rest.T @ rest, ranks[1])
    middle = (rest @ right).reshape(ranks[0], n2, d2, ranks[1]).permute(1, 0, 2, 3)
    return (
        left.reshape(n1, -1),
        middle.reshape(n2, -1),
        right.T.reshape(ranks[1], n3, d3).permute(1, 0, 2).reshape(n3, -1),
    )


def _leading(gram: Tensor, rank: int) -> Tensor:
    """(M, rank) leading eigenvectors of a Gram matrix, filled up with zeros where it has fewer."""
    vectors = torch.linalg.eigh(gram.double())[1].flip(1)[:, :rank].float()
    return torch.nn.functional.pad(vectors, (0, rank - vectors.shape[1]))


def _stored_width(floats: int) -> int:
    """Fused kernels take rows of multiples of 4."""
    return -(-floats // 4) * 4


def _core_floats(row_factors: Sequence[int], column_factors: Sequence[int], ranks: Sequence[int]) -> int:
    d1, d2, d3 = column_factors
    widths = (d1 * ranks[0], ranks[0] * d2 * ranks[1], ranks[1] * d3)
    return sum(rows * _stored_width(width) for rows, width in zip(row_factors, widths, strict=True))


@torch.no_grad()
def _fill_sampled_gaussian(ranges: Sequence[tuple[int, float]], weight: Tensor) -> None:
    """Draws from the tails of a Gaussian, scaled to a standard deviation for each range of rows.

    Without the values around 0 the product of three draws is not peaked at 0, nearer to the Gaussian it stands for.
    """
    tail = 0.5 * math.erfc(_CUT / math.sqrt(2))
    density = math.exp(-(_CUT**2) / 2) / math.sqrt(2 * math.pi)
    tail_deviation = math.sqrt(1 + _CUT * density / tail)
    for part, (_, deviation) in zip(weight.split([count for count, _ in ranges]), ranges, strict=True):
        # By the inverse of the distribution function; half of the draws in each tail.
        part.uniform_(-tail, tail)
        draws = torch.special.ndtri(part.abs().clamp(min=1e-12)) * part.sign()
        part.copy_(draws.mul_(deviation / tail_deviation))
