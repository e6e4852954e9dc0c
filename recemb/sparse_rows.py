"""Rows of which each keeps columns of its own: which columns, and where their values lie.

Values lie row after row. Two ways to tell the columns: a number for each value, or a bit for each column of a row; the
first is smaller for a value or so a row, or for wide rows.

Shapes: M rows asked for, V values of them, D columns, R rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recemb.rank_bitmap import BLOCK_BITS, BLOCK_BYTES, RankBitmap, blocks_for

# Rows whose numbers of values follow one pointer.
_POINTER_ROWS = 16

# (V,) int64 each: which of the rows asked for, column, and place among all values.
Found = tuple[Tensor, Tensor, Tensor]


class NumberedColumns(nn.Module):
    """A column number for each value: 1 byte up to D = 256, else 2; a count of 1 or 2 bytes a row; a pointer for 16.

    Args:
        num_rows, num_values: R and all their values.
        width: D.
    """

    def __init__(self, num_rows: int, num_values: int, width: int) -> None:
        super().__init__()
        blocks = -(-num_rows // _POINTER_ROWS)
        self.counts: Tensor
        self.register_buffer("counts", torch.zeros(blocks, _POINTER_ROWS, dtype=_count_dtype(width)))
        self.starts: Tensor
        self.register_buffer("starts", torch.zeros(blocks, dtype=_pointer_dtype(num_values)))
        self.columns: Tensor
        self.register_buffer("columns", torch.zeros(num_values, dtype=_column_dtype(width)))

    @staticmethod
    def num_bytes(num_rows: int, num_values: int, width: int) -> int:
        """Bytes of the buffers; the values come besides."""
        blocks = -(-num_rows // _POINTER_ROWS)
        pointers = blocks * (_POINTER_ROWS * _count_dtype(width).itemsize + _pointer_dtype(num_values).itemsize)
        return pointers + num_values * _column_dtype(width).itemsize

    @torch.no_grad()
    def fill(self, first_row: int, first_value: int, mask: Tensor) -> None:
        """Write the columns of rows from ``first_row`` on, whose values lie from ``first_value`` on.

        Args:
            mask: (rows, D) bool, what they keep.
        """
        counts = mask.sum(dim=1)
        rows = torch.arange(first_row, first_row + len(mask))
        self.counts.view(-1)[first_row : first_row + len(mask)] = counts.to(self.counts.dtype)
        # Rows that open a block; a table may begin inside of one.
        opens = rows % _POINTER_ROWS == 0
        begins = first_value + counts.cumsum(0) - counts
        self.starts[rows[opens] // _POINTER_ROWS] = begins[opens].to(self.starts.dtype)
        columns = mask.nonzero()[:, 1]
        self.columns[first_value : first_value + len(columns)] = columns.to(self.columns.dtype)

    def find(self, rows: Tensor) -> Found:
        """The values of (M,) int64 rows, row after row."""
        blocks, inside = rows // _POINTER_ROWS, rows % _POINTER_ROWS
        counts = self.counts.index_select(0, blocks)
        # Narrow integers: these are the largest tensors here.
        is_before = torch.ones(_POINTER_ROWS, _POINTER_ROWS, dtype=counts.dtype, device=rows.device).tril_(-1)
        before = (counts * is_before.index_select(0, inside)).sum(dim=1)
        count = counts.gather(1, inside.unsqueeze(1)).squeeze(1).to(torch.int64)
        owners = torch.repeat_interleave(count)
        values = _places(self.starts.index_select(0, blocks) + before, count, owners)
        return owners, self.columns.index_select(0, values).to(torch.int64), values


class MarkedColumns(nn.Module):
    """A bit for each column of a row, 1.25 with their ranks; up to D = 64 rounded up to a power of 2.

    Args:
        num_rows: R.
        width: D.
    """

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self._stride = _stride(width)
        self.bitmap = RankBitmap(blocks_for(num_rows * self._stride))

    @staticmethod
    def num_bytes(num_rows: int, width: int) -> float:
        """Bytes of the bits; whole for all rows that are stored together."""
        return num_rows * _stride(width) * BLOCK_BYTES / BLOCK_BITS

    @staticmethod
    def num_blocks(num_rows: int, width: int) -> int:
        """Blocks of the bitmap."""
        return blocks_for(num_rows * _stride(width))

    def fill(self, mask: Tensor) -> None:
        """Write the columns of all rows, (R, D) bool."""
        self.bitmap.set_bits(nn.functional.pad(mask, (0, self._stride - mask.shape[1])).view(-1))

    def find(self, rows: Tensor) -> Found:
        """The values of (M,) int64 rows, row after row."""
        first_bits = rows * self._stride
        _, first = self.bitmap(first_bits)
        words = self.bitmap.words.view(-1)
        if self._stride < 64:
            word = words.index_select(0, first_bits >> 6) >> (first_bits & 63)
            bits = (word.unsqueeze(1) >> torch.arange(self._stride, device=rows.device)).bitwise_and_(1)
        else:
            numbers = (first_bits >> 6).unsqueeze(1) + torch.arange(self._stride // 64, device=rows.device)
            bits = (words[numbers].unsqueeze(2) >> torch.arange(64, device=rows.device)).bitwise_and_(1)
            bits = bits.view(len(rows), self._stride)
        owners, columns = bits.nonzero().unbind(dim=1)
        return owners, columns, _places(first, bits.sum(dim=1), owners)


def _places(first: Tensor, count: Tensor, owners: Tensor) -> Tensor:
    """``first[m], first[m] + 1, ...``, ``count[m]`` of them, row after row; ``owners`` repeats the rows' numbers."""
    before = count.cumsum(0) - count
    return torch.arange(len(owners), device=owners.device) + (first - before).index_select(0, owners)


def _stride(width: int) -> int:
    """Bits of a row: so many that a word holds whole rows, or a row whole words."""
    return 1 << (width - 1).bit_length() if width <= 64 else -(-width // 64) * 64


def _column_dtype(width: int) -> torch.dtype:
    return torch.uint8 if width <= 256 else torch.int16


def _count_dtype(width: int) -> torch.dtype:
    return torch.uint8 if width <= 255 else torch.int16


def _pointer_dtype(num_values: int) -> torch.dtype:
    return torch.int32 if num_values < 2**31 else torch.int64
