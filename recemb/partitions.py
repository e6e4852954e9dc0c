"""Complementary partitions: several coarse classifications of ids that together tell every two ids apart.

Reference: Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation
Systems", KDD 2020, arXiv:1909.02107, section 3.

A partition here is a pair of integers: id ``i`` is in class ``(i // divisor) % size``. The first partition is the
large one, whose classes hold ``num_collisions`` ids each at most.

Which ids share the first partition's classes decides how well a model trains where ids are in order of frequency:
``"remainder_first"`` and ``"chinese_remainder"`` put a frequent id together with rare ones, ``"mixed_radix"`` the most
frequent ones with each other (``experiments/complementary_partitions``).

Shapes: n num_embeddings, k num_partitions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.stacked import at_features, first_rows, per_feature

FAMILIES = ("remainder_first", "mixed_radix", "chinese_remainder")
_Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Partitions:
    """The partitions of one table: id ``i`` is in class ``(i // divisors[j]) % sizes[j]`` of partition ``j``."""

    divisors: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def total_classes(self) -> int:
        """Classes in all partitions: rows that composing needs."""
        return sum(self.sizes)

    def classes(self, i: int) -> tuple[int, ...]:
        """Class of one id in every partition."""
        return tuple((i // divisor) % size for divisor, size in zip(self.divisors, self.sizes, strict=True))


def naive_partition(num_embeddings: int) -> Partitions:
    """Every id in a class of its own."""
    return Partitions((1,), (num_embeddings,))


@functools.lru_cache(maxsize=4096)
def choose_partitions(
    family: str, num_embeddings: int, num_collisions: int, num_partitions: int, *, cost_ratio: float = 1.0
) -> Partitions:
    """The cheapest complementary partitions whose first one puts at most ``num_collisions`` ids in a class.

    Cost is the first partition's classes plus ``cost_ratio`` times the others'. Among equals the one with the fewest
    collisions. More allowed collisions never cost more.

    Args:
        family: ``"remainder_first"`` (quotient-remainder where k = 2: the remainder of a large divisor first, then the
            quotient's digits), ``"mixed_radix"`` (the quotient first, then the remainder's digits) or
            ``"chinese_remainder"`` (remainders of pairwise coprime divisors).
        num_embeddings: n, ids to tell apart.
        num_collisions: at least 1; up to n ** ((k - 1) / k) it makes tables smaller.
        num_partitions: k, at least 1.
        cost_ratio: what a class of the other partitions costs, in classes of the first.
    """
    if family not in FAMILIES:
        raise ValueError(f"partitions must be of one of the families {FAMILIES}, got {family!r}")
    if num_collisions < 1 or num_partitions < 1:
        raise ValueError(
            f"num_collisions and num_partitions must be at least 1, got {num_collisions} and {num_partitions}"
        )
    if num_partitions == 1:
        return naive_partition(num_embeddings)
    first, others, products = _candidates(family, num_embeddings, num_partitions)
    allowed = int(np.searchsorted(products, num_collisions, side="right"))
    costs = first[:allowed] + cost_ratio * others[:, :allowed].sum(axis=0)
    best = int(np.argmin(costs))
    small = [int(size) for size in others[:, best]]
    sizes = (int(first[best]), *small)
    if family == "chinese_remainder":
        return Partitions((1,) * num_partitions, sizes)
    if family == "remainder_first":
        return Partitions(tuple(math.prod(sizes[:index]) for index in range(num_partitions)), sizes)
    return Partitions((math.prod(small), *(math.prod(small[:index]) for index in range(len(small)))), sizes)


@functools.lru_cache(maxsize=256)
def _candidates(family: str, num_embeddings: int, num_partitions: int) -> tuple[_Integers, _Integers, _Integers]:
    """Sizes of the first partition (C,), of the others (k - 1, C), and the product of the others (C,), ascending."""
    # Beyond the optimum n ** ((k - 1) / k) of equal partitions (four times it, to be safe) costs only rise.
    largest = math.ceil(4 * num_embeddings ** ((num_partitions - 1) / num_partitions))
    largest_base = math.ceil(largest ** (1 / (num_partitions - 1))) + 1
    others = (_coprime if family == "chinese_remainder" else _balanced)(largest_base, num_partitions - 1)
    others = others[:, np.argsort(others.prod(axis=0), kind="stable")]
    products = others.prod(axis=0)
    first = -(-num_embeddings // products)
    if family == "chinese_remainder":
        first = _raise_until_coprime(first, others)
    return first, others, products


def _balanced(largest_base: int, count: int) -> _Integers:
    """(count, C) radices that differ by one at most: (1, 1), (2, 1), (2, 2), (3, 2), ..."""
    base, num_raised = np.divmod(np.arange(largest_base * count, dtype=np.int64), count)
    return np.stack([base + 1 + (index < num_raised) for index in range(count)])


def _coprime(largest_base: int, count: int) -> _Integers:
    """(count, C): for every base the largest pairwise coprime integers up to it (1 as often as needed)."""
    chosen = np.arange(1, largest_base + 1, dtype=np.int64)[None, :]
    for _ in range(count - 1):
        candidate = np.maximum(chosen[-1] - 1, 1)
        while (shared := (np.gcd(candidate, chosen) > 1).any(axis=0)).any():
            candidate -= shared
        chosen = np.concatenate([chosen, candidate[None, :]])
    return chosen


def _raise_until_coprime(first: _Integers, others: _Integers) -> _Integers:
    first = first.copy()
    while (shared := (np.gcd(first, others) > 1).any(axis=0)).any():
        first += shared
    return first


def check_complementary(table: str, num_embeddings: int, classes_nk: Tensor) -> None:
    """Refuse classes that do not tell all ids of a table apart.

    Args:
        table: its name, for the message.
        num_embeddings: n.
        classes_nk: (n, k) integers: class of every id in every partition.

    Raises:
        ValueError: another shape, no integers, a negative class, or two ids that agree in all classes (named).
    """
    if classes_nk.ndim != 2 or classes_nk.shape[0] != num_embeddings or classes_nk.shape[1] < 1:
        raise ValueError(f"table {table!r}: classes must be ({num_embeddings}, k), got {tuple(classes_nk.shape)}")
    if classes_nk.is_floating_point() or classes_nk.dtype == torch.bool:
        raise ValueError(f"table {table!r}: classes must be integers, got {classes_nk.dtype}")
    if num_embeddings and int(classes_nk.min()) < 0:
        raise ValueError(f"table {table!r}: classes must be at least 0, got {int(classes_nk.min())}")
    _, inverse, counts = torch.unique(classes_nk, dim=0, return_inverse=True, return_counts=True)
    if counts.numel() < num_embeddings:
        shared = int((counts > 1).nonzero()[0])
        first, second = (inverse == shared).nonzero().view(-1)[:2].tolist()
        raise ValueError(
            f"table {table!r}: partitions must be complementary, but ids {first} and {second} agree in all classes "
            f"{tuple(classes_nk[first].tolist())} ({num_embeddings - counts.numel()} ids are not told apart)"
        )


class PartitionRows(nn.Module):
    """Turns ids into rows of k stacked tables, one for each partition: a range of rows a logical table, a row a class.

    Args:
        tables: the logical tables.
        partitions: those of each table, k of them.
        classes: table name -> (num_embeddings, k) integers that replace the computed classes, kept in the smallest
            integers that hold them.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        partitions: Sequence[Partitions],
        classes: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        sizes = list(zip(*(each.sizes for each in partitions), strict=True))
        divisors = list(zip(*(each.divisors for each in partitions), strict=True))
        self._divides = [any(divisor > 1 for divisor in column) for column in divisors]
        # A quotient needs no remainder: it is below the number of classes already.
        self._wraps = [
            any(divisor * size < table.num_embeddings for divisor, size, table in zip(*columns, tables, strict=True))
            for columns in zip(divisors, sizes, strict=True)
        ]
        # What serving needs is saved, and counted in the model's bytes.
        self.divisors: Tensor
        self.register_buffer("divisors", torch.stack([per_feature(tables, column) for column in divisors]))
        self.sizes: Tensor
        # A table without classes in a partition reads row 0, which then counts for nothing.
        self.register_buffer("sizes", torch.stack([per_feature(tables, column).clamp(min=1) for column in sizes]))
        self.starts: Tensor
        starts = [
            per_feature(tables, [start if size else 0 for start, size in zip(first_rows(column), column, strict=True)])
            for column in sizes
        ]
        self.register_buffer("starts", torch.stack(starts))
        self._known = _KnownClasses(tables, classes) if classes else None

    def forward(self, index: int, ids: Tensor, features: Tensor | None) -> Tensor:
        """Rows of ``ids`` in the stacked table of partition ``index``, int64, same shape.

        Args:
            index: which partition.
            ids: (B, F), or (N,) with
            features: the (N,) feature of each id.
        """
        rows = ids
        if self._divides[index]:
            # Integers: ids / divisor would pass through float32 and misplace ids above 2**24.
            rows = torch.div(rows, at_features(self.divisors[index], features), rounding_mode="floor")
        if self._wraps[index]:
            rows = rows % at_features(self.sizes[index], features)
        if self._known is not None:
            rows = self._known.replace(index, rows, ids, features)
        return rows + at_features(self.starts[index], features)


class _KnownClasses(nn.Module):
    """Classes given id by id for some of the tables."""

    def __init__(self, tables: Sequence[EmbeddingBagConfig], classes: Mapping[str, Tensor]) -> None:
        super().__init__()
        num_rows = [table.num_embeddings if table.name in classes else 0 for table in tables]
        for index, dtype in enumerate(class_dtypes(classes)):
            column = torch.cat([classes[table.name][:, index] for table in tables if table.name in classes])
            self.register_buffer(f"partition_{index}", column.to(dtype).to(torch.get_default_device()))
        self._starts: Tensor
        self.register_buffer("_starts", per_feature(tables, first_rows(num_rows)), persistent=False)
        self._is_known: Tensor
        self.register_buffer("_is_known", per_feature(tables, [rows > 0 for rows in num_rows]) > 0, persistent=False)

    def replace(self, index: int, computed: Tensor, ids: Tensor, features: Tensor | None) -> Tensor:
        is_known = at_features(self._is_known, features)
        # Ids of other tables read entry 0, which is then not used.
        entries = torch.where(is_known, ids + at_features(self._starts, features), 0)
        return torch.where(is_known, self.get_buffer(f"partition_{index}")[entries].long(), computed)


def class_dtypes(classes: Mapping[str, Tensor]) -> list[torch.dtype]:
    """The smallest integers that hold the classes of all tables, for each partition."""
    largest = [max(column) for column in zip(*(c.amax(dim=0).tolist() for c in classes.values()), strict=True)]
    sizes = (torch.uint8, torch.int16, torch.int32, torch.int64)
    return [next(dtype for dtype in sizes if value <= torch.iinfo(dtype).max) for value in largest]


def known_partitions(classes_nk: Tensor) -> Partitions:
    """As many classes as given; the divisors mean nothing."""
    sizes = tuple(int(largest) + 1 for largest in classes_nk.amax(dim=0))
    return Partitions((1,) * len(sizes), sizes)
