"""Compositional embeddings from complementary partitions: quotient-remainder and its relatives.

Reference: Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation
Systems", KDD 2020, arXiv:1909.02107.

Differs from the paper's released code (not from its text): ids are divided as integers, where float32 misplaces ids
above 2**24; vectors are composed id by id before a bag is pooled, where the code multiplies pooled factors; factors
start symmetric around 0, those of the large partition with a full table's variance and the others with 1, where the
code starts all of them in [sqrt(1/n), 1]; with ``"concat"`` every factor is ``embedding_dim / k`` wide, so that
compressed and full tables are equally wide.

Shapes: N ids, B batch, F features, D embedding_dim, k partitions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.bags import Bags
from recemb.method import CompressedTables
from recemb.partitions import (
    PartitionRows,
    Partitions,
    check_complementary,
    choose_partitions,
    class_dtypes,
    known_partitions,
)
from recemb.products import gated_product
from recemb.spending import spend
from recemb.stacked import (
    FeatureGate,
    features_of_ids,
    first_rows,
    forward_linear,
    seed_full_tables,
    stacked_table,
    start_variance,
)

OPERATIONS = ("mult", "add", "concat")


class Complementary(CompressedTables):
    """Gives id ``i`` the product (or sum, or concatenation) of k rows: one for its class in each of k partitions.

    The partitions tell every two ids apart, so no two ids share all their rows. Quotient-remainder is
    ``family="remainder_first"`` with two partitions, rows ``i % m`` and ``i // m`` with ``m = ceil(n / c)``, or
    ``"mixed_radix"``, rows ``i // c`` and ``i % c``.

    Memory: rows for all classes of all partitions, ``ceil(n / c) + c`` for quotient-remainder, of ``embedding_dim``
    values (``embedding_dim / k`` with ``"concat"``); least, about ``k * n ** (1 / k)`` rows, at
    ``c = n ** ((k - 1) / k)``. A table that would not shrink stays full, and so does one below the collection's
    ``full_below_rows`` (the paper's threshold; it tries 20 to 20,000).

    To feed the k rows to the model as k features of their own (the paper's feature generation), see
    ``recemb.generated_features``.

    Args:
        tables: the logical tables.
        num_collisions: c, ids that may share a row of the first partition. The paper reports 4 to 60. Each table takes
            the cheapest partitions with at most c collisions.
        num_parameters: floats in all, instead of num_collisions; what a byte budget turns. All tables take the smallest
            c that this pays, and some the next smaller ones, which uses up the rest (``recemb.spending``). A single
            table has no sizes between those of two c: at 3x, nothing between a third and a quarter of it.
        family: which ids share a row of the first, large partition. ``"remainder_first"``: ids ``m`` apart, so that a
            frequent id shares with rare ones; take it with ids in order of frequency, as recemb prepares them.
            ``"mixed_radix"``: c neighbours, as in the paper's code; the most frequent ids then share with each other,
            which trains worse than plain hashing to as many rows (``experiments/complementary_partitions``).
            ``"chinese_remainder"``: remainders of coprime divisors, so that neighbours share no row at all.
        num_partitions: k; 1 keeps full tables, more make them smaller at the same c.
        operation: ``"mult"`` (the paper's best on DCN), ``"add"``, or ``"concat"`` (its best on DLRM; k must divide
            ``embedding_dim`` into multiples of 4). Only concatenated rows are proven to stay distinct.
        classes: table name -> (num_embeddings, k) integers, for tables whose ids have known properties: class of each
            id in each partition (a product's category, brand and size). They are kept as small integers, counted in
            the model's bytes. Tables not named take ``family``.

    Raises:
        ValueError: both or neither of num_collisions and num_parameters, unknown family or operation, c or k below 1,
            an ``embedding_dim`` that ``"concat"`` cannot split, classes of an unknown table, of another shape, or that
            do not tell two ids apart (named).

    Example:
        >>> tables = [EmbeddingBagConfig(name="t_ad", num_embeddings=10**6, embedding_dim=16, feature_names=["ad"])]
        >>> Complementary(tables, num_collisions=4)
        Complementary(...)
    """

    budget_knob: ClassVar[str | None] = "num_parameters"
    merges_ids: ClassVar[bool] = True

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        *,
        num_collisions: int | None = None,
        num_parameters: int | None = None,
        family: str = "remainder_first",
        num_partitions: int = 2,
        operation: str = "mult",
        classes: Mapping[str, Tensor] | None = None,
    ) -> None:
        if operation not in OPERATIONS:
            raise ValueError(f"operation must be one of {OPERATIONS}, got {operation!r}")
        if (num_collisions is None) == (num_parameters is None):
            raise ValueError(
                f"Complementary: give num_collisions or a budget (num_parameters), one of them; "
                f"got num_collisions={num_collisions}, num_parameters={num_parameters}"
            )
        classes = dict(classes or {})
        _check_classes(tables, classes, num_partitions)
        width = _part_width(tables[0], num_partitions, operation)
        class_bytes = sum(dtype.itemsize for dtype in class_dtypes(classes))
        given = {name: known_partitions(known) for name, known in classes.items()}

        def partitions(table: EmbeddingBagConfig, collisions: int) -> Partitions | None:
            """Of one table; None where it stays full."""
            chosen = given.get(table.name)
            num_bytes = 0 if chosen is None else table.num_embeddings * class_bytes
            if chosen is None:
                chosen = choose_partitions(family, table.num_embeddings, collisions, num_partitions)
            num_bytes += chosen.total_classes * width * 4
            # A first partition without collisions tells all ids apart alone.
            is_full = chosen.sizes[0] >= table.num_embeddings or num_bytes >= table.num_embeddings * width_bytes
            return None if is_full else chosen

        width_bytes = tables[0].embedding_dim * 4
        if num_collisions is not None:
            chosen = [partitions(table, num_collisions) for table in tables]
        else:
            chosen = _within(num_parameters or 0, tables, partitions, width)
        self.is_full = [part is None for part in chosen]
        self.partitions = [
            _full(table, num_partitions, operation) if part is None else part
            for table, part in zip(tables, chosen, strict=True)
        ]
        super().__init__(tables, self._physical_tables(tables, width, operation))
        kept = [table.name for table, is_full in zip(tables, self.is_full, strict=True) if not is_full]
        known_classes = {name: known for name, known in classes.items() if name in kept}
        self._rows = PartitionRows(tables, self.partitions, known_classes)
        self._operation = operation
        # Full tables have a row in the first stack alone, unless rows are concatenated.
        self._is_composed = FeatureGate(tables, [not is_full for is_full in self.is_full])

    def remap(self, bags: Bags) -> list[list[Tensor]]:
        features = features_of_ids(bags)
        slots = [self._rows(index, bags.ids, features) for index in range(sum(map(len, self.physical_tables)))]
        return [slots] if len(self.lookups) == 1 else [[slot] for slot in slots]

    def compose(self, rows: list[list[Tensor]], bags: Bags) -> Tensor:
        if self._operation == "concat":
            return torch.cat(rows[0], dim=1) if len(rows[0]) > 1 else rows[0][0]
        [first], *others = rows
        if not others:
            return first
        gate = self._is_composed.of_ids(bags)
        if self._operation == "add":
            return _gated_sum(first, [other for [other] in others], gate)
        return gated_product(first, [other for [other] in others], gate)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        bags = Bags.of(features)
        if len(self.lookups) == 1:
            return forward_linear(self, bags, self._is_mean)
        if self._operation == "mult" or bags.single or bags.weights is not None:
            return bags.pool(self.embed(bags), self._is_mean)
        # Sums commute with sums over a bag, so the kernel pools.
        offsets, num_bags = bags.offsets(), bags.lengths.numel()
        first, *others = [
            self.lookup_bags(index, slots, offsets, num_bags) for index, slots in enumerate(self.remap(bags))
        ]
        return bags.lay_out(_gated_sum(first, others, self._is_composed.of_bags(bags)), self._is_mean)

    def seed_from(self, full_tables: Mapping[str, Tensor]) -> list[str]:
        """Tables that stay full; factors of a trained table are not sought."""
        stacks = []
        for index in range(len(self.physical_tables[0])):
            weight = self.get_parameter(f"lookups.0.embedding_bags.partition_{index}.weight")
            stacks.append((weight, first_rows([partitions.sizes[index] for partitions in self.partitions])))
        return seed_full_tables(stacks, self.tables, self.is_full, full_tables)

    @classmethod
    def budget_range(cls, tables: Sequence[EmbeddingBagConfig]) -> tuple[int, int]:
        return 1, sum(table.num_embeddings * table.embedding_dim for table in tables)

    def _physical_tables(
        self, tables: Sequence[EmbeddingBagConfig], width: int, operation: str
    ) -> list[list[EmbeddingBagConfig]]:
        """One stack for each partition; full tables of products and sums have rows in the first one only.

        Concatenated rows are read in one call, others in one call a stack, which spares cutting its output apart.
        """
        num_partitions = len(self.partitions[0].sizes)
        concatenates = operation == "concat"
        num_stacks = num_partitions if concatenates or not all(self.is_full) else 1
        stacks = []
        for index in range(num_stacks):
            rows = [partitions.sizes[index] for partitions in self.partitions]
            variances = [
                start_variance(table) if is_full else _part_variance(table, index, num_partitions, operation)
                for table, is_full in zip(tables, self.is_full, strict=True)
            ]
            stacks.append(stacked_table(f"partition_{index}", rows, width, variances))
        return [stacks] if concatenates else [[stack] for stack in stacks]


def _within(
    num_parameters: int,
    tables: Sequence[EmbeddingBagConfig],
    partitions: Callable[[EmbeddingBagConfig, int], Partitions | None],
    width: int,
) -> list[Partitions | None]:
    """Partitions of every table whose rows have ``num_parameters`` floats at most, or the fewest they can."""
    sizes = [table.num_embeddings for table in tables]
    # With more than two partitions tables shrink beyond c = sqrt(n); each table stops at its own optimum.
    most = max(sizes)

    def cost(index: int, level: int) -> int:
        chosen = partitions(tables[index], most - level)
        return sizes[index] * tables[index].embedding_dim if chosen is None else chosen.total_classes * width

    levels = spend(num_parameters, sizes, most, cost)
    return [partitions(table, most - level) for table, level in zip(tables, levels, strict=True)]


def _gated_sum(first: Tensor, others: Sequence[Tensor], gate: Tensor | None) -> Tensor:
    """``first``, and the others too where the gate is open."""
    for other in others:
        first = first + (other if gate is None else other * gate)
    return first


def _part_width(table: EmbeddingBagConfig, num_partitions: int, operation: str) -> int:
    if operation != "concat":
        return table.embedding_dim
    if table.embedding_dim % num_partitions or table.embedding_dim // num_partitions % 4:
        raise ValueError(
            f"table {table.name!r}: embedding_dim / num_partitions must be a multiple of 4 to concatenate, "
            f"got {table.embedding_dim} / {num_partitions}"
        )
    return table.embedding_dim // num_partitions


def _part_variance(table: EmbeddingBagConfig, index: int, num_partitions: int, operation: str) -> float:
    """Variance with which rows of partition ``index`` start, for vectors to have a full table's.

    Factors beside the first start around size 1. Equal ones, each the k-th root of a small number, would scale each
    other's gradients down: a step of Adagrad or Adam, as large as the learning rate whatever the gradient, then moves a
    product by some hundredths of what it moves a row of a full table.
    """
    variance = start_variance(table)
    if operation == "mult":
        return variance if index == 0 else 1.0
    return variance / num_partitions if operation == "add" else variance


def _full(table: EmbeddingBagConfig, num_partitions: int, operation: str) -> Partitions:
    """A row an id: in every stack where rows are concatenated, else in the first."""
    size = table.num_embeddings if operation == "concat" else 0
    return Partitions((1,) * num_partitions, (table.num_embeddings, *[size] * (num_partitions - 1)))


def _check_classes(tables: Sequence[EmbeddingBagConfig], classes: Mapping[str, Tensor], num_partitions: int) -> None:
    by_name = {table.name: table for table in tables}
    if unknown := sorted(set(classes) - set(by_name)):
        raise ValueError(f"classes name tables {unknown}, which are not among {sorted(by_name)}")
    for name, known in classes.items():
        check_complementary(name, by_name[name].num_embeddings, known)
        if known.shape[1] != num_partitions:
            raise ValueError(
                f"table {name!r}: classes must be of num_partitions = {num_partitions} partitions, got {known.shape[1]}"
            )
