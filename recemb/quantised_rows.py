"""Rows in 8 or 4 bits a value with a scale a row, and the same values of rows that are float32 still.

A row is ``scale * codes`` with integer codes in [-127, 127] or [-7, 7]. The scale is the smallest that reaches the
row's largest value, rounded up to one of 256: five bits of exponent and three of mantissa. A byte instead of float16's
two makes a row of 8 values at 4 bits a sixth smaller and its steps at most an eighth wider, and as it is a cut of
float32's own bits, every device computes it alike.

Gradients pass a rounding unchanged (straight-through): Bengio et al., arXiv:1308.3432.

Shapes: R rows, W values of a row, M rows that are looked up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Bits of a float32 below the three of mantissa that a scale keeps.
_DROPPED_BITS = 20
# Scale code 0, as the upper bits of a float32: 2**-27.
_FIRST_SCALE = (127 - 27) << 3
_LAST_CODE = 255
_LARGEST_SCALE = (1 + 7 / 8) * 2.0**4
CODE_BITS = (8, 4)


def largest_code(bits: int) -> int:
    """127 for 8 bits, 7 for 4: as many steps on either side of 0."""
    return (1 << (bits - 1)) - 1


def round_rows(rows: Tensor, largest: Tensor | int) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows.

    Args:
        rows: (..., W) float32, up to ``largest * 30``; beyond, scales end and codes are larger than ``largest``.
        largest: largest code, one for all rows or (..., 1).

    Returns:
        (..., W) whole float32 codes in [-largest, largest] and (..., 1) uint8-ranged int32 codes of the scales.
    """
    # Rounded up, so that no value of the row lies beyond the largest code.
    bits = (rows.abs().amax(dim=-1, keepdim=True) / largest).view(torch.int32)
    bits = bits.add_((1 << _DROPPED_BITS) - 1).bitwise_right_shift_(_DROPPED_BITS)
    scales = bits.sub_(_FIRST_SCALE).clamp_(0, _LAST_CODE)
    codes = rows.div(scale_of(scales)).round_()
    return codes, scales


def scale_of(codes: Tensor) -> Tensor:
    """Codes of scales, integers in [0, 255] -> float32."""
    return (codes.to(torch.int32) + _FIRST_SCALE).bitwise_left_shift_(_DROPPED_BITS).view(torch.float32)


def as_served(rows: Tensor, largest: Tensor | int) -> Tensor:
    """(..., W) rows rounded to the values that ``QuantisedRows`` would serve, bit for bit; gradients pass unchanged.

    Args:
        rows: (..., W) float32.
        largest: largest code, one for all rows or (..., 1).
    """
    rounded: Tensor = _Rounded.apply(rows, largest)
    return rounded


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, largest: Tensor | int) -> Tensor:
        codes, scales = round_rows(rows, largest)
        # Codes of small negative values are -0.0, which integers have not.
        return codes.mul_(scale_of(scales)).add_(0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class QuantisedRows(nn.Module):
    """R rows of W values at 8 or 4 bits, with a byte of scale a row. Buffers: nothing in it trains.

    Memory: ``R * (W * bits / 8 + 1)`` bytes; memory reports list it as a table.

    Args:
        num_rows: R.
        width: W, even at 4 bits.
        bits: 8 or 4.

    Raises:
        ValueError: other bits, an odd width at 4.
    """

    def __init__(self, num_rows: int, width: int, bits: int) -> None:
        super().__init__()
        if bits not in CODE_BITS or width * bits % 8:
            raise ValueError(f"bits must be one of {CODE_BITS} and fill whole bytes, got {bits} for width {width}")
        self.width = width
        self.bits = bits
        self.codes: Tensor
        self.register_buffer("codes", torch.zeros(num_rows, width * bits // 8, dtype=torch.uint8))
        self.scales: Tensor
        self.register_buffer("scales", torch.zeros(num_rows, dtype=torch.uint8))

    @property
    def num_rows(self) -> int:
        return self.codes.shape[0]

    def forward(self, rows: Tensor) -> Tensor:
        """(M,) int64 rows -> (M, W) float32."""
        packed = self.codes.index_select(0, rows)
        if self.bits == 8:
            codes = packed.view(torch.int8).to(torch.float32)
        else:
            pairs = torch.stack([packed & 15, packed >> 4], dim=-1)
            codes = pairs.view(len(packed), self.width).to(torch.float32).sub_(8)
        return codes.mul_(scale_of(self.scales.index_select(0, rows)).unsqueeze(1))

    @torch.no_grad()
    def write(self, first: int, rows: Tensor) -> None:
        """Round (M, W) float32 ``rows`` into rows ``first`` to ``first + M``.

        Raises:
            ValueError: values that are not finite, or larger than the largest scale reaches.
        """
        limit = largest_code(self.bits) * _LARGEST_SCALE
        if not bool((rows.abs() <= limit).all()):
            wrong = int((rows.abs() <= limit).all(dim=1).logical_not().nonzero()[0])
            raise ValueError(
                f"row {first + wrong}: values at {self.bits} bits must be in [-{limit:g}, {limit:g}], got "
                f"{rows[wrong].tolist()}"
            )
        codes, scales = round_rows(rows, largest_code(self.bits))
        place = slice(first, first + len(rows))
        self.scales[place] = scales.view(-1).to(torch.uint8)
        if self.bits == 8:
            self.codes[place] = codes.to(torch.int8).view(torch.uint8)
        else:
            pairs = codes.add_(8).to(torch.uint8).view(len(rows), -1, 2)
            self.codes[place] = pairs[..., 0] | (pairs[..., 1] << 4)
