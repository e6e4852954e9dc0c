"""Rows with columns of their own against a plain loop over a mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.sparse_rows import MarkedColumns, NumberedColumns


@settings(max_examples=80, deadline=None)
@given(
    num_rows=st.integers(1, 70),
    width=st.sampled_from([1, 4, 12, 16, 20, 64, 68, 128, 256, 260]),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    form=st.sampled_from(["numbers", "marks"]),
    seed=st.integers(0, 99),
)
def test_values_of_rows_are_found_where_a_loop_counts_them(
    num_rows: int, width: int, share: float, form: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_rows, width, generator=generator) < share
    total = int(mask.sum())
    if form == "marks":
        columns = MarkedColumns(num_rows, width)
        columns.fill(mask)
        assert MarkedColumns.num_blocks(num_rows, width) * 40 == sum(t.nbytes for t in columns.state_dict().values())
    else:
        columns = NumberedColumns(num_rows, total, width)
        cut = num_rows // 3
        columns.fill(0, 0, mask[:cut])
        columns.fill(cut, int(mask[:cut].sum()), mask[cut:])
        expected_bytes = sum(tensor.nbytes for tensor in columns.state_dict().values())
        assert NumberedColumns.num_bytes(num_rows, total, width) == expected_bytes
    places, number = {}, 0
    for row in range(num_rows):
        for column in range(width):
            if mask[row, column]:
                places[row, column] = number
                number += 1
    rows = torch.randint(0, num_rows, (2 * num_rows,), generator=generator)
    owners, found, values = (tensor.tolist() for tensor in columns.find(rows))
    expected = [
        (owner, column, places[row, column])
        for owner, row in enumerate(rows.tolist())
        for column in range(width)
        if mask[row, column]
    ]
    assert list(zip(owners, found, values, strict=True)) == expected


@pytest.mark.parametrize("columns", [MarkedColumns(5, 8), NumberedColumns(5, 0, 8)])
def test_no_rows_have_no_values(columns: MarkedColumns | NumberedColumns) -> None:
    assert all(len(part) == 0 for part in columns.find(torch.zeros(0, dtype=torch.int64)))
