"""Trained rows into packed tables.

Shapes: n num_embeddings of a table, D embedding_dim, R rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.method import Method
from recemb.packed_tables import MARKED, SPARSE, PackedTables
from recemb.plan import CompressionPlan, TablePlan
from recemb.pruned_bytes import PackedTable, packed_sizes, packed_table, patterns, plan_sizes
from recemb.row_sections import DROPPED
from recemb.stacked import first_rows

# Read, masked and written at a time.
_ROWS_AT_ONCE = 1 << 18

# (R,) int64 ids -> (R, D) masked rows, (R, D) bool what is kept of them.
_Reader = Callable[[Tensor], tuple[Tensor, Tensor]]

# (index of the table, (R,) int64 ids) -> (R, D) float32 rows of these ids, of which what the plan drops is not read.
RowReader = Callable[[int, Tensor], Tensor]


@torch.no_grad()
def pack(
    tables: Sequence[EmbeddingBagConfig],
    plans: Mapping[str, TablePlan],
    rows_of: RowReader,
    *,
    dropped_vectors: Tensor | None = None,
) -> PackedTables:
    """Packed tables that give the vectors of masked full tables, bit for bit (zeros without their sign).

    Args:
        tables: the logical tables, of one embedding_dim.
        plans: table name -> what is kept; an id of which no value is kept is dropped.
        rows_of: reads full-width rows.
        dropped_vectors: (tables, D) float32, what the dropped ids of each table get; None: zeros.
    """
    dropped = "zero" if dropped_vectors is None else "vector"
    stored = [packed_table(plans[table.name], dropped=dropped) for table in tables]
    packed = PackedTables(tables, sizes=[packed_sizes(stored, tables[0].embedding_dim)])
    numbers = {columns: number for number, columns in enumerate(patterns(stored))}
    if numbers:
        packed.patterns.copy_(torch.tensor(list(numbers)))
    writer = _Writer(packed)
    sections: list[Tensor] = []
    bits: list[Tensor] = []
    starts = first_rows([table.num_embeddings for table in tables])
    for index, (table, form) in enumerate(zip(tables, stored, strict=True)):
        vector = None if dropped_vectors is None else dropped_vectors[index]
        read = functools.partial(_masked_rows, plans[table.name], functools.partial(rows_of, index), vector)
        places = writer.write(form, read, numbers)
        first_bit = sum(map(len, bits))
        bits.append(form.sections.bits(form.codes))
        sections.append(_placed_sections(form, starts[index], places, first_bit))
        if form.needs_vector:
            assert vector is not None
            writer.write_vector(index, vector)
    writer.finish()
    for target, column in zip(
        (packed.section_starts, packed.section_rows, packed.section_bits, packed.section_patterns),
        torch.cat(sections, dim=1),
        strict=True,
    ):
        target.copy_(column)
    if packed.bitmap is not None:
        packed.bitmap.set_bits(torch.cat(bits))
        # A section's rows are counted from its own first bit, the bitmap's from the first of all.
        has_bits = packed.section_bits >= 0
        _, before = packed.bitmap(packed.section_bits[has_bits])
        packed.section_rows[has_bits] -= before
    return packed


def packed_method(plan: CompressionPlan, *, dropped: str | None = None) -> Method:
    """A method that builds the packed tables of ``plan`` empty: for ``recemb.estimate_memory``, for loading."""
    return functools.partial(PackedTables, sizes=plan_sizes(plan, dropped=dropped))


class _Writer:
    """Appends rows to the values of packed tables."""

    def __init__(self, packed: PackedTables) -> None:
        self._packed = packed
        # Number of columns -> rows written so far.
        self._dense_rows: dict[int, int] = {}
        self._sparse_rows = self._sparse_values = self._marked_rows = self._marked_values = self._vectors = 0
        self._marks: list[Tensor] = []

    def write(
        self,
        form: PackedTable,
        read: _Reader,
        numbers: Mapping[tuple[bool, ...], int],
    ) -> dict[int, tuple[int, int]]:
        """All rows of a table.

        Returns:
            Code -> (number of the pattern, first row among those of its form).
        """
        if form.columns is None:
            first = self._marked_rows if form.is_marked else self._sparse_rows
            if form.is_marked:
                self._write_marked(form, read)
            else:
                self._write_sparse(form, read)
            return {0: (MARKED if form.is_marked else SPARSE, first)}
        places = {}
        for code, columns, num_rows in form.dense_rows():
            width = sum(columns)
            first = self._dense_rows.get(width, 0)
            self._dense_rows[width] = first + num_rows
            places[code] = (numbers[columns], first)
            target, chosen = self._packed.values(f"dense{width}"), torch.tensor(columns)
            for ids in (form.codes == code).nonzero().view(-1).split(_ROWS_AT_ONCE):
                target[first : first + len(ids)] = read(ids)[0][:, chosen]
                first += len(ids)
        return places

    def _write_sparse(self, form: PackedTable, read: _Reader) -> None:
        packed, columns = self._packed, self._packed.sparse
        for ids in (form.codes >= 0).nonzero().view(-1).split(_ROWS_AT_ONCE):
            rows, mask = read(ids)
            num_values = int(mask.sum())
            if columns is not None:
                columns.fill(self._sparse_rows, self._sparse_values, mask)
                place = slice(self._sparse_values, self._sparse_values + num_values)
                packed.values("sparse").view(-1)[place] = rows[mask]
            self._sparse_rows += len(ids)
            self._sparse_values += num_values

    def _write_marked(self, form: PackedTable, read: _Reader) -> None:
        for ids in (form.codes >= 0).nonzero().view(-1).split(_ROWS_AT_ONCE):
            rows, mask = read(ids)
            self._marks.append(mask)
            place = slice(self._marked_values, self._marked_values + int(mask.sum()))
            self._packed.values("marked").view(-1)[place] = rows[mask]
            self._marked_rows += len(ids)
            self._marked_values = place.stop

    def finish(self) -> None:
        """Write what can be written only once all tables are known."""
        if self._packed.marked is not None:
            self._packed.marked.fill(torch.cat(self._marks))

    def write_vector(self, table: int, vector: Tensor) -> None:
        """What dropped ids of a table get."""
        assert self._packed.vector_of_table is not None
        self._packed.values("dropped")[self._vectors] = vector
        self._packed.vector_of_table[table] = self._vectors
        self._vectors += 1


def _masked_rows(
    plan: TablePlan, rows_of: Callable[[Tensor], Tensor], vector: Tensor | None, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """(R,) ids -> (R, D) rows with zeros where nothing is kept, or ``vector`` in a dropped row; (R, D) what is kept."""
    mask = plan.mask_of(ids)
    rows = rows_of(ids).cpu().masked_fill(~mask, 0.0)
    if vector is not None:
        rows = torch.where(mask.any(dim=1, keepdim=True), rows, vector.cpu())
    # Kernels add rows to 0.0, which leaves no zero its sign.
    return rows + 0.0, mask


def _placed_sections(
    form: PackedTable, first_position: int, places: Mapping[int, tuple[int, int]], first_bit: int
) -> Tensor:
    """(4, S) int64: first position, row, bit (-1 without bits) and pattern of each section of a table."""
    sections = form.sections
    codes = sections.codes.tolist()
    found = [places.get(code, (DROPPED, 0)) for code in codes]
    pattern, first_row = torch.tensor(found, dtype=torch.int64).view(-1, 2).unbind(dim=1)
    bits_before = sections.num_bits.cumsum(0) - sections.num_bits
    return torch.stack(
        [
            sections.starts + first_position,
            first_row + sections.first_rows,
            torch.where(sections.num_bits > 0, bits_before + first_bit, -1),
            pattern,
        ]
    )
