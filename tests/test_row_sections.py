"""Sections of ids against a plain loop, and the smallest of them by hand."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.row_sections import DROPPED, SECTION_BYTES, RowSections, row_sections


def look_up(sections: RowSections, bits: torch.Tensor, value: int) -> tuple[int, int]:
    """(code, row) of an id by the definition of sections; (-1, -1) where it is dropped."""
    starts = sections.starts.tolist()
    last = max(index for index, start in enumerate(starts) if start <= value)
    first_bits = [0, *sections.num_bits.cumsum(0).tolist()]
    index = last
    while index >= 0 and starts[index] == starts[last]:
        code, row = int(sections.codes[index]), int(sections.first_rows[index])
        offset = value - starts[index]
        if not int(sections.num_bits[index]):
            return (code, row + offset) if code >= 0 else (-1, -1)
        if bits[first_bits[index] + offset]:
            return code, row + int(bits[first_bits[index] : first_bits[index] + offset].sum())
        index -= 1
    return -1, -1


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(1, 300),
    num_codes=st.integers(1, 4),
    dropped=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    layout=st.sampled_from(["runs", "alternating", "few holes"]),
    seed=st.integers(0, 999),
)
def test_every_id_finds_its_code_and_the_rank_of_its_row(
    length: int, num_codes: int, dropped: float, layout: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, num_codes, (length,), generator=generator)
    if layout != "alternating":
        codes = codes.sort().values
    holes = torch.rand(length, generator=generator)
    codes[(holes < dropped) if layout != "few holes" else (holes < 0.01)] = DROPPED
    sections = row_sections(codes.to(torch.int16))
    bits = sections.bits(codes)
    for value, code in enumerate(codes.tolist()):
        expected = (code, int((codes[:value] == code).sum())) if code >= 0 else (-1, -1)
        assert look_up(sections, bits, value) == expected


def test_a_prefix_is_two_sections_and_no_bits() -> None:
    codes = torch.where(torch.arange(10_000) < 700, 0, DROPPED)
    sections = row_sections(codes)
    assert sections.starts.tolist() == [0, 700]
    assert sections.codes.tolist() == [0, DROPPED]
    assert sections.num_bytes() == 2 * SECTION_BYTES


def test_all_ids_of_one_code_are_one_section() -> None:
    assert row_sections(torch.zeros(5, dtype=torch.int16)).num_bytes() == SECTION_BYTES
    assert row_sections(torch.full((5,), DROPPED)).num_bytes() == SECTION_BYTES


def test_holes_cost_a_bit_an_id_and_the_dropped_tail_nothing() -> None:
    codes = torch.where((torch.arange(100_000) < 20_000) & (torch.arange(100_000) % 2 == 0), 0, DROPPED)
    sections = row_sections(codes)
    assert int(sections.num_bits.sum()) == 19_999
    assert sections.starts.tolist() == [0, 19_999]


def test_frequency_blocks_share_one_bit_an_id() -> None:
    """Blocks of ids are runs: each has bits for its own ids only."""
    codes = torch.arange(9_000) // 3_000
    codes[torch.arange(9_000) % 5 == 1] = DROPPED
    assert int(row_sections(codes).num_bits.sum()) <= 9_000


def test_codes_that_alternate_lie_over_each_other() -> None:
    codes = torch.arange(5_000) % 3
    sections = row_sections(codes)
    assert sections.num_layers == 3
    assert int(sections.num_bits.sum()) == 15_000
