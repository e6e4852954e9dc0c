"""Bytes that a plan would serve in, for any widths of its tables, and widths made to fit a budget.

Shapes: T searched tables, D embedding_dim of one.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

import torch

from recemb.budget import BudgetOutOfReach
from recemb.plan import CompressionPlan, TablePlan
from recemb.pruned_bytes import PackedTable, packed_sizes, packed_table
from recemb.training.evolution import Candidate


def with_widths(plan: CompressionPlan, widths: Mapping[str, int]) -> CompressionPlan:
    """``plan`` with the first columns alone, of the tables named; the others as they are."""
    tables = {
        name: dataclasses.replace(table, kept_columns=_prefix(table, widths[name])) if name in widths else table
        for name, table in plan.tables.items()
    }
    return dataclasses.replace(plan, tables=tables)


def _prefix(table: TablePlan, width: int) -> torch.Tensor | None:
    full = table.embedding_dim
    return None if width == full else torch.arange(full).unsqueeze(0) < width


class CandidateBytes:
    """Serving bytes of candidates, exactly as their tables will measure once converted.

    Args:
        plan: which rows stay; widths are a candidate's.
        tables: names of the searched tables, in the order of a candidate's widths.
    """

    def __init__(self, plan: CompressionPlan, tables: Sequence[str]) -> None:
        self._plan = plan
        self._tables = list(tables)
        # Of (table, width): looks at every row, so once each.
        self._packed: dict[tuple[str, int], PackedTable] = {}
        self._rows = [plan.tables[name].num_rows() for name in tables]

    def __call__(self, candidate: Candidate) -> int:
        by_dim: dict[int, list[PackedTable]] = {}
        widths = dict(zip(self._tables, candidate, strict=True))
        for name, table in self._plan.tables.items():
            by_dim.setdefault(table.embedding_dim, []).append(self._table(name, widths.get(name)))
        return sum(packed_sizes(packed, dim).num_bytes() for dim, packed in by_dim.items())

    def smallest(self) -> int:
        """Bytes with one column of every searched table."""
        return self((1,) * len(self._tables))

    def fit(self, candidate: Candidate, budget_bytes: int, generator: random.Random) -> Candidate:
        """``candidate`` if it fits, else with columns taken off one by one until it does.

        A table loses its last column with a chance in proportion to the values that saves.

        Raises:
            BudgetOutOfReach: not even one column of every table fits.
        """
        widths = list(candidate)
        while (excess := self(tuple(widths)) - budget_bytes) > 0:
            if max(widths) == 1:
                raise BudgetOutOfReach(
                    f"budget of {budget_bytes:,} bytes: one column of every table takes {self.smallest():,}"
                )
            # What a column takes is known without packing: its values.
            while excess > 0 and max(widths) > 1:
                weights = [rows if width > 1 else 0 for rows, width in zip(self._rows, widths, strict=True)]
                if not any(weights):
                    weights = [int(width > 1) for width in widths]
                [index] = generator.choices(range(len(widths)), weights)
                widths[index] -= 1
                excess -= self._rows[index] * 4
        return tuple(widths)

    def _table(self, name: str, width: int | None) -> PackedTable:
        table = self._plan.tables[name]
        key = (name, table.embedding_dim if width is None else width)
        if key not in self._packed:
            plan = table if width is None else dataclasses.replace(table, kept_columns=_prefix(table, width))
            self._packed[key] = packed_table(plan, dropped=self._plan.dropped)
        return self._packed[key]
