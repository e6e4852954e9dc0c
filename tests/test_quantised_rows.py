"""Rows in few bits against exact arithmetic, and against float32 rows that are rounded alike."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recemb.memory.report import parameter_bytes
from recemb.quantised_rows import QuantisedRows, as_served

VALUES = st.floats(-200, 200, width=32, allow_subnormal=False)
ROWS = st.lists(st.lists(VALUES, min_size=4, max_size=4), min_size=1, max_size=5)
SCALES = [Fraction(8 + eighths, 8) * Fraction(2) ** exponent for exponent in range(-27, 5) for eighths in range(8)]


def plain_row(row: list[float], bits: int) -> list[float]:
    """The row rounded in fractions: the smallest scale of 256 that reaches its largest value, then half to even."""
    largest = 2 ** (bits - 1) - 1
    # The quotient of two float32 is one.
    needed = Fraction(float((torch.tensor(row).abs().max() / largest).item()))
    scale = next(scale for scale in SCALES if scale >= needed)
    codes = [round(Fraction(float((torch.tensor(value) / float(scale)).item()))) for value in row]
    assert all(abs(code) <= largest for code in codes)
    return [float(torch.tensor(float(code)) * float(scale)) for code in codes]


def stored(rows: Tensor, bits: int) -> QuantisedRows:
    table = QuantisedRows(len(rows), rows.shape[1], bits)
    table.write(0, rows)
    return table


@given(rows=ROWS, bits=st.sampled_from([4, 8]))
def test_rows_come_back_as_exact_arithmetic_rounds_them(rows: list[list[float]], bits: int) -> None:
    served = stored(torch.tensor(rows), bits)(torch.arange(len(rows)))
    assert served.tolist() == [plain_row(row, bits) for row in rows]


@given(rows=ROWS, bits=st.sampled_from([4, 8]))
def test_float_rows_are_rounded_to_what_is_stored_bit_for_bit(rows: list[list[float]], bits: int) -> None:
    served = stored(torch.tensor(rows), bits)(torch.arange(len(rows)))
    rounded = as_served(torch.tensor(rows), 2 ** (bits - 1) - 1)
    assert torch.equal(rounded.view(torch.int32), served.view(torch.int32))


@pytest.mark.parametrize("bits", [4, 8])
def test_no_value_is_off_by_more_than_half_a_step_and_steps_are_an_eighth_wider_at_most(bits: int) -> None:
    rows = torch.randn(10_000, 8, dtype=torch.float64).mul(torch.logspace(-5, 1, 10_000).unsqueeze(1)).float()
    step = rows.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    errors = (stored(rows, bits)(torch.arange(10_000)) - rows).abs()
    assert bool((errors <= 0.5001 * 9 / 8 * step).all())


def test_rows_of_one_call_may_have_different_numbers_of_bits() -> None:
    rows = torch.randn(6, 2, 4)
    largest = torch.tensor([127.0, 7, 7, 127, 7, 127]).view(6, 1, 1)
    expected = torch.stack([as_served(row, int(most)) for row, most in zip(rows, largest.view(-1), strict=True)])
    assert torch.equal(as_served(rows, largest), expected)


def test_gradients_pass_as_if_nothing_was_rounded() -> None:
    rows = torch.randn(5, 8, requires_grad=True)
    weights = torch.randn(5, 8)
    (as_served(rows, 7) * weights).sum().backward()
    assert torch.equal(rows.grad, weights)


def test_small_values_become_zero_without_a_sign() -> None:
    rows = torch.tensor([[0.875, -1e-3, 0.0, -0.0], [0.0, -0.0, 1e-30, -1e-30]])
    for values in (as_served(rows, 7), stored(rows, 4)(torch.arange(2))):
        assert values.tolist() == [[0.875, 0.0, 0.0, 0.0], [0.0] * 4] and not bool(values.signbit().any())


@pytest.mark.parametrize(("bits", "expected"), [(8, 100 * (12 + 1)), (4, 100 * (6 + 1))])
def test_a_row_takes_its_bits_and_a_byte(bits: int, expected: int) -> None:
    assert parameter_bytes(QuantisedRows(100, 12, bits)) == expected


def test_rows_may_be_written_in_parts_and_read_in_any_order() -> None:
    rows = torch.randn(10, 4)
    table, whole = QuantisedRows(10, 4, 4), stored(rows, 4)
    for first in (6, 0, 3):
        table.write(first, rows[first : first + 4])
    order = torch.tensor([9, 0, 0, 5])
    assert torch.equal(table(order), whole(torch.arange(10))[order])
    assert table(torch.empty(0, dtype=torch.int64)).shape == (0, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -211.0])
def test_values_that_have_no_code_are_refused(value: float) -> None:
    rows = torch.zeros(4, 4)
    rows[2, 1] = value
    with pytest.raises(ValueError, match=r"row 5: values at 4 bits must be in \[-210, 210\]"):
        QuantisedRows(10, 4, 4).write(3, rows)


@pytest.mark.parametrize(("width", "bits"), [(8, 2), (3, 4), (8, 16)])
def test_bits_that_do_not_exist_or_fill_no_byte_are_refused(width: int, bits: int) -> None:
    with pytest.raises(ValueError, match=rf"got {bits} for width {width}"):
        QuantisedRows(10, width, bits)
