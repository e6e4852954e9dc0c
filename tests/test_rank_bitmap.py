"""Ranks in a bitmap against counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.rank_bitmap import BLOCK_BYTES, RankBitmap, blocks_for


@settings(max_examples=60, deadline=None)
@given(num_bits=st.integers(0, 1100), share=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]), seed=st.integers(0, 99))
def test_ranks_are_counts_of_bits_before(num_bits: int, share: float, seed: int) -> None:
    bits = torch.rand(num_bits, generator=torch.Generator().manual_seed(seed)) < share
    bitmap = RankBitmap(blocks_for(num_bits))
    bitmap.set_bits(bits)
    positions = torch.randperm(num_bits)
    is_set, rank = bitmap(positions)
    assert torch.equal(is_set, bits[positions])
    assert rank.tolist() == [int(bits[:position].sum()) for position in positions.tolist()]


def test_bytes_are_those_of_the_buffers() -> None:
    bitmap = RankBitmap(blocks_for(257))
    assert sum(tensor.nbytes for tensor in bitmap.state_dict().values()) == 2 * BLOCK_BYTES


def test_bits_are_set_anew_each_time() -> None:
    bitmap = RankBitmap(1)
    bitmap.set_bits(torch.ones(256, dtype=torch.bool))
    bitmap.set_bits(torch.arange(256) == 200)
    assert bitmap(torch.tensor([199, 200, 201]))[0].tolist() == [False, True, False]


def test_lookups_leave_the_bitmap_alone() -> None:
    bitmap = RankBitmap(1)
    bitmap.set_bits(torch.arange(256) % 3 == 0)
    first = bitmap(torch.arange(256))
    assert all(torch.equal(a, b) for a, b in zip(first, bitmap(torch.arange(256)), strict=True))


@pytest.mark.parametrize("position", [63, 64, 127, 191, 255])
def test_the_last_bit_of_a_word_counts_for_those_behind_it_only(position: int) -> None:
    bitmap = RankBitmap(1)
    bitmap.set_bits(torch.arange(256) == position)
    rank = bitmap(torch.arange(256))[1]
    assert rank.tolist() == [int(other > position) for other in range(256)]
