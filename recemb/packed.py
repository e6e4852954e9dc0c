"""A few trainable numbers an id, packed: fused kernels want rows of four values, so neighbouring ids share a row.

Shapes: N ids in all bags, F features, W numbers an id, P ids a row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recemb.method import physical_table
from recemb.stacked import at_features, first_rows, per_feature

_ROW = 4


class PackedNumbers(nn.Module):
    """Keeps W numbers for each of the positions of every table, in rows of 4 (of a multiple of 4 where W is larger).

    One number takes 4 bytes, as it should: 4 positions a row; two numbers, 2 positions; three waste a quarter.
    Neighbouring positions share a row because ids are in order of frequency: row-wise Adagrad has one step size a row,
    and a rare id beside a frequent one would stop learning. Its accumulator takes the mean over the row, so a number
    whose neighbours are silent moves in steps up to twice as long as it would alone.

    Args:
        tables: the logical tables.
        num_positions: of each table; 0 where it has none.
        start: the W numbers every position starts with.
    """

    def __init__(
        self, tables: Sequence[EmbeddingBagConfig], num_positions: Sequence[int], start: Sequence[float]
    ) -> None:
        super().__init__()
        self._start = list(start)
        self.num_rows = [rows_for(count, len(start)) for count in num_positions]
        self._positions_per_row = positions_per_row(len(start))
        # A table without positions reads row 0, which then counts for nothing: all bits of an id are shifted out.
        shift = self._positions_per_row.bit_length() - 1
        self._shifts: Tensor
        shifts = per_feature(tables, [shift if count else 63 for count in num_positions])
        self.register_buffer("_shifts", shifts, persistent=False)
        # What serving needs is saved, and counted in the model's bytes.
        self.starts: Tensor
        starts = [start if rows else 0 for start, rows in zip(first_rows(self.num_rows), self.num_rows, strict=True)]
        self.register_buffer("starts", per_feature(tables, starts))

    def table(self, name: str) -> EmbeddingBagConfig:
        """The physical table."""
        # Where W does not fill the row, the rest starts at 0 and is never read.
        entry = self._start + [0.0] * (-len(self._start) % (_ROW // self._positions_per_row))
        return physical_table(name, sum(self.num_rows), _width(len(entry)), functools.partial(_fill, entry))

    def slots(self, positions: Tensor, features: Tensor | None) -> Tensor:
        """Rows of the physical table for (B, F) positions, or (N,) ones with the (N,) feature of each."""
        return (positions >> at_features(self._shifts, features)) + at_features(self.starts, features)

    def numbers(self, rows_NR: Tensor, positions: Tensor) -> Tensor:
        """The numbers of N positions from their rows: (N, R) -> (N, W)."""
        count = len(self._start)
        if self._positions_per_row == 1:
            return rows_NR[:, :count]
        entries = (positions.view(-1, 1, 1) & (self._positions_per_row - 1)).expand(-1, 1, count)
        return rows_NR.view(rows_NR.shape[0], self._positions_per_row, count).gather(1, entries).squeeze(1)


def positions_per_row(count: int) -> int:
    """How many positions of ``count`` numbers share a row."""
    return {1: 4, 2: 2}.get(count, 1)


def rows_for(num_positions: int, count: int) -> int:
    """Rows for ``count`` numbers at each position."""
    return -(-num_positions // positions_per_row(count))


def bytes_for(num_positions: int, count: int) -> int:
    """Bytes of those rows."""
    return rows_for(num_positions, count) * _width(count) * 4


def _width(count: int) -> int:
    return -(-count // _ROW) * _ROW


@torch.no_grad()
def _fill(entry: Sequence[float], weight: Tensor) -> None:
    weight.view(-1, len(entry)).copy_(torch.tensor(entry, device=weight.device))
