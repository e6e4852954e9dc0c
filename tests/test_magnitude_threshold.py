"""The k-th magnitude against a sort, whole and over ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.magnitude_threshold import kth_magnitude
from tests.gloo import run_ranks

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(FLOATS, max_size=20), min_size=1, max_size=3), st.data())
def test_equals_the_sorted_magnitudes(parts: list[list[float]], data: st.DataObject) -> None:
    values = np.sort(np.abs(np.concatenate([np.asarray(part, np.float32) for part in parts])))
    if len(values) == 0:
        with pytest.raises(ValueError, match=r"k must be in \[1, 0\], got 1"):
            kth_magnitude([torch.tensor(part) for part in parts], 1)
        return
    k = data.draw(st.integers(1, len(values)))
    assert kth_magnitude([torch.tensor(part) for part in parts], k) == values[k - 1]


def test_larger_than_a_piece_of_one_pass() -> None:
    values = torch.randn(1 << 17, 5, generator=torch.Generator().manual_seed(0)) * 1e-3
    expected = values.abs().view(-1).sort().values
    for k in (1, 12_345, 600_000, 5 << 17):
        assert kth_magnitude([values], k) == expected[k - 1]


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k must be in \[1, 3\], got 4"):
        kth_magnitude([torch.ones(3)], 4)


def test_not_a_number_is_refused_where_it_would_be_the_answer() -> None:
    with pytest.raises(ValueError, match="NaN"):
        kth_magnitude([torch.tensor([1.0, float("nan")])], 2)


def of_rank(rank: int, folder: Path) -> None:
    mine = torch.arange(10.0)[rank::2]
    found = [kth_magnitude([mine], k, over_ranks=True) for k in (1, 4, 10)]
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_ranks_find_that_of_all_their_values(tmp_path: Path) -> None:
    run_ranks(of_rank, tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [0.0, 3.0, 9.0]
