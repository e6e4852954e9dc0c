"""Which packed form each table of a plan takes, the one of fewest bytes, and how many bytes that is.

Shapes: n num_embeddings of a table, D its embedding_dim, G groups of its rows, V values kept of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from recemb.plan import CompressionPlan, TablePlan
from recemb.rank_bitmap import BLOCK_BYTES, blocks_for
from recemb.row_sections import DROPPED, SECTION_BYTES, RowSections, one_section, row_sections
from recemb.sparse_rows import MarkedColumns, NumberedColumns

DROPPED_VECTORS = ("zero", "vector")
_MAX_PATTERNS = 2**15
# Counted one by one, up to this many.
_FEW_CODES = 16


@dataclass(frozen=True)
class PackedTable:
    """One table, as it will be stored.

    Args:
        codes: (n,) int16: which columns an id's row has, ``DROPPED`` for ids without a row.
        sections: from ids to rows.
        columns: code -> (D,) bool, the columns of its rows; None: each row has columns of its own.
        num_rows: code -> rows.
        num_values: values of rows with columns of their own, 0 for others.
        is_full: nothing would be smaller than all rows.
        needs_vector: ids without a row get a vector that was learned.
        is_marked: rows with columns of their own have a bit for each column, not a number for each value.
    """

    codes: Tensor
    sections: RowSections
    columns: tuple[tuple[bool, ...], ...] | None
    num_rows: tuple[int, ...]
    num_values: int
    is_full: bool = False
    needs_vector: bool = False
    is_marked: bool = False

    def dense_rows(self) -> Iterator[tuple[int, tuple[bool, ...], int]]:
        """Code, columns and number of rows, of every code that has dense rows."""
        for code, columns in enumerate(self.columns or ()):
            if self.num_rows[code]:
                yield code, columns, self.num_rows[code]

    def num_bytes(self, embedding_dim: int) -> float:
        """About the bytes it takes; tables share blocks of bits and of pointers."""
        vector = embedding_dim * 4 if self.needs_vector else 0
        if self.columns is None:
            [rows] = self.num_rows
            columns: float = NumberedColumns.num_bytes(rows, self.num_values, embedding_dim)
            if self.is_marked:
                columns = MarkedColumns.num_bytes(rows, embedding_dim)
            values = columns + self.num_values * 4
        else:
            values = sum(rows * sum(columns) * 4 for _, columns, rows in self.dense_rows())
        return values + self.sections.num_bytes() + vector


@dataclass(frozen=True)
class PackedSizes:
    """The sizes of all tensors of packed tables of one width: enough to build them empty, and to count their bytes.

    Args:
        embedding_dim: D.
        dense: (columns, rows) of each table of dense rows, columns ascending.
        num_patterns: different sets of columns of dense rows.
        num_sections: of all tables.
        max_sections: of one table.
        num_layers: sections that start with the same id, at most.
        num_bits: of all sections.
        num_sparse_rows, num_sparse_values: of all tables whose rows have a number for each value's column.
        num_marked_rows, num_marked_values: of all tables whose rows have a bit for each column.
        num_vectors: tables that keep a learned vector for dropped ids.
        num_tables: logical tables.
    """

    embedding_dim: int
    dense: tuple[tuple[int, int], ...]
    num_patterns: int
    num_sections: int
    max_sections: int
    num_layers: int
    num_bits: int
    num_sparse_rows: int
    num_sparse_values: int
    num_marked_rows: int
    num_marked_values: int
    num_vectors: int
    num_tables: int

    def __post_init__(self) -> None:
        # From a file they are lists.
        object.__setattr__(self, "dense", tuple((columns, rows) for columns, rows in self.dense))

    def num_bytes(self) -> int:
        """Serving bytes, maps and everything included."""
        width = self.embedding_dim
        return (
            sum(columns * rows * 4 for columns, rows in self.dense)
            + self.num_patterns * width
            + self.num_sections * SECTION_BYTES
            + blocks_for(self.num_bits) * BLOCK_BYTES
            + NumberedColumns.num_bytes(self.num_sparse_rows, self.num_sparse_values, width)
            + MarkedColumns.num_blocks(self.num_marked_rows, width) * BLOCK_BYTES
            + (self.num_sparse_values + self.num_marked_values) * 4
            + self.num_vectors * width * 4
            + (self.num_tables * 4 if self.num_vectors else 0)
        )


def packed_sizes(tables: Iterable[PackedTable], embedding_dim: int) -> PackedSizes:
    """The sizes of tables that are stored together."""
    stored = list(tables)
    rows_of: dict[int, int] = {}
    for table in stored:
        for _, columns, rows in table.dense_rows():
            rows_of[sum(columns)] = rows_of.get(sum(columns), 0) + rows
    sparse = [table for table in stored if table.columns is None and not table.is_marked]
    marked = [table for table in stored if table.is_marked]
    return PackedSizes(
        embedding_dim=embedding_dim,
        dense=tuple(sorted(rows_of.items())),
        num_patterns=len(patterns(stored)),
        num_sections=sum(len(table.sections.starts) for table in stored),
        max_sections=max(len(table.sections.starts) for table in stored),
        num_layers=max(table.sections.num_layers for table in stored),
        num_bits=sum(int(table.sections.num_bits.sum()) for table in stored),
        num_sparse_rows=sum(table.num_rows[0] for table in sparse),
        num_sparse_values=sum(table.num_values for table in sparse),
        num_marked_rows=sum(table.num_rows[0] for table in marked),
        num_marked_values=sum(table.num_values for table in marked),
        num_vectors=sum(table.needs_vector for table in stored),
        num_tables=len(stored),
    )


def patterns(tables: Iterable[PackedTable]) -> list[tuple[bool, ...]]:
    """The different sets of columns that dense rows have, in an order that depends on nothing else.

    Raises:
        ValueError: 2**15 of them, or more.
    """
    found = {columns for table in tables for _, columns, _ in table.dense_rows()}
    if len(found) >= _MAX_PATTERNS:
        raise ValueError(
            f"kept_columns of all tables must be fewer than {_MAX_PATTERNS} different sets, got {len(found)}"
        )
    return sorted(found)


def packed_table(plan: TablePlan, *, dropped: str = "zero") -> PackedTable:
    """The smallest form of one table: full, dense rows of the columns its groups keep, or rows of single values.

    Args:
        plan: what is kept. An id of which no value is kept is dropped.
        dropped: ``"zero"``, or ``"vector"``: dropped ids share a learned vector.
    """
    check_dropped(dropped)
    n, width = plan.num_embeddings, plan.embedding_dim
    if plan.kept_rows is plan.kept_columns is plan.kept_values is None:
        return _full(n, width)
    codes, columns, num_values = _kept(plan)
    if len(columns) <= _FEW_CODES:
        counts = [int((codes == code).count_nonzero()) for code in range(len(columns))]
    else:
        counts = torch.bincount(codes[codes >= 0].to(torch.int64), minlength=len(columns)).tolist()
    needs_vector = dropped == "vector" and sum(counts) < n
    candidates = [_full(n, width)]
    dense = row_sections(codes)
    candidates.append(PackedTable(codes, dense, columns, tuple(counts), 0, needs_vector=needs_vector))
    if plan.kept_values is not None:
        single = codes if len(columns) == 1 else torch.where(codes >= 0, 0, DROPPED).to(torch.int16)
        sections = dense if len(columns) == 1 else row_sections(single)
        for is_marked in (False, True):
            rows = (sum(counts),)
            candidates.append(PackedTable(single, sections, None, rows, num_values, False, needs_vector, is_marked))
            if dropped == "zero":
                # No map, and rows of no values for dropped ids.
                every = (_every(n), one_section())
                candidates.append(PackedTable(*every, None, (n,), num_values, is_marked=is_marked))
    return min(candidates, key=lambda candidate: candidate.num_bytes(width))


def plan_sizes(plan: CompressionPlan, *, dropped: str | None = None) -> tuple[PackedSizes, ...]:
    """The sizes of the packed tables of a plan, for each embedding_dim, ascending."""
    dropped = plan.dropped if dropped is None else dropped
    by_width: dict[int, list[PackedTable]] = {}
    for table in plan.tables.values():
        by_width.setdefault(table.embedding_dim, []).append(packed_table(table, dropped=dropped))
    return tuple(packed_sizes(tables, width) for width, tables in sorted(by_width.items()))


def plan_bytes(plan: CompressionPlan, *, dropped: str | None = None) -> int:
    """Serving bytes of the tables of a plan once they are trained and converted, without building anything.

    Equal to ``measure_memory`` of the converted collection of these tables, on any device. A few nanoseconds a row, so
    that a budget can be bisected over masks.

    Args:
        plan: what is kept.
        dropped: what ids without a row get, as for ``recemb.methods.pruned.Pruned``; None: what the plan says.
    """
    return sum(sizes.num_bytes() for sizes in plan_sizes(plan, dropped=dropped))


def check_dropped(dropped: str) -> None:
    if dropped not in DROPPED_VECTORS:
        raise ValueError(f"dropped must be one of {DROPPED_VECTORS}, got {dropped!r}")


def _any_in_row(mask: Tensor) -> Tensor:
    """``mask.any(dim=1)`` of (n, D) bool; several times as fast, eight or four columns at a time."""
    width = mask.shape[1]
    if width % 4:
        return mask.any(dim=1)
    words = mask.contiguous().view(torch.int64 if width % 8 == 0 else torch.int32).unbind(dim=1)
    return functools.reduce(torch.bitwise_or, words) != 0


def _full(num_embeddings: int, width: int) -> PackedTable:
    return PackedTable(_every(num_embeddings), one_section(), ((True,) * width,), (num_embeddings,), 0, is_full=True)


def _every(num_embeddings: int) -> Tensor:
    """Codes of a table of one code, without memory for each."""
    return torch.zeros(1, dtype=torch.int16).expand(num_embeddings)


def _kept(plan: TablePlan) -> tuple[Tensor, tuple[tuple[bool, ...], ...], int]:
    """Code of every row, the columns of each code, and how many values are kept where they are given one by one."""
    n, width = plan.num_embeddings, plan.embedding_dim
    columns = torch.ones(1, width, dtype=torch.bool) if plan.kept_columns is None else plan.kept_columns
    # Groups of the same columns are one.
    distinct, code_of_group = torch.unique(columns, dim=0, return_inverse=True)
    code_of_group = torch.where(distinct.any(dim=1)[code_of_group], code_of_group, DROPPED).to(torch.int16)
    if plan.row_groups is None:
        codes = code_of_group.expand(n).clone()
    else:
        codes = code_of_group[plan.row_groups.to(torch.int64)]
    if plan.kept_rows is not None:
        codes.masked_fill_(~plan.kept_rows, DROPPED)
    num_values = 0
    if plan.kept_values is not None:
        mask = plan.kept_values
        if plan.kept_columns is not None:
            mask = mask & (columns if plan.row_groups is None else columns[plan.row_groups.to(torch.int64)])
        if plan.kept_rows is not None:
            mask = mask & plan.kept_rows.unsqueeze(1)
        codes.masked_fill_(~_any_in_row(mask), DROPPED)
        num_values = int(mask.count_nonzero())
    return codes, tuple(tuple(row) for row in distinct.tolist()), num_values
