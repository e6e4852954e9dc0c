"""The frozen hash: golden vectors, a plain Python twin, uniformity, independence of salts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.hashing import MAX_SLOTS, hash_to_ranges, hash_to_slots, mix, salt, slot_prefixes

MASK = (1 << 64) - 1
NUM_SLOTS = st.one_of(st.integers(1, 100), st.integers(2**31 - 2, 2**31 + 2), st.integers(1, MAX_SLOTS))

# Computed once by plain_slot and blake2b, then frozen: saved models depend on them.
GOLDEN_SLOTS = [363010, 997542, 368636, 783781, 317285, 562905, 495600, 235528]
GOLDEN_SALTS = [-8901871961858517231, 7735683866161932780, -6834899634699146083, 1626394779864043795]


def plain_slot(value: int, salt_value: int, num_slots: int) -> int:
    """The same hash in unbounded Python integers."""
    bits = (value * 0x9E3779B97F4A7C15) & MASK
    bits ^= salt_value & MASK
    bits ^= bits >> 30
    bits = (bits * 0xBF58476D1CE4E5B9) & MASK
    bits ^= bits >> 27
    bits = (bits * 0x94D049BB133111EB) & MASK
    bits ^= bits >> 31
    prefix = 63 - num_slots.bit_length()
    # Of fewer values than slots otherwise.
    prefix *= 2 if num_slots > 2**31 else 1
    return ((bits >> (64 - prefix)) * num_slots) >> prefix


def test_golden_slots_never_change() -> None:
    ids = torch.tensor([0, 1, 2, 2**24, 2**24 + 1, 2**31, 2**53 + 1, 2**63 - 1])
    salts = torch.tensor(salt("t_ad"))
    assert hash_to_slots(ids, salts, 1_000_003).tolist() == GOLDEN_SLOTS


def test_golden_salts_never_change() -> None:
    assert [salt("t_ad"), salt("t_ad", 1), salt("t_ad", 0, seed=1), salt("Ⅷ")] == GOLDEN_SALTS


@settings(max_examples=200, deadline=None)
@given(
    value=st.integers(0, 2**63 - 1),
    salt_value=st.integers(-(2**63), 2**63 - 1),
    num_slots=NUM_SLOTS,
)
def test_slots_equal_those_of_unbounded_python_integers(value: int, salt_value: int, num_slots: int) -> None:
    slot = int(hash_to_slots(torch.tensor([value]), torch.tensor([salt_value]), num_slots)[0])
    assert slot == plain_slot(value, salt_value, num_slots)
    assert 0 <= slot < num_slots


def test_inputs_are_left_alone() -> None:
    ids = torch.arange(10)
    hash_to_slots(ids, torch.tensor(5), 7)
    assert torch.equal(ids, torch.arange(10))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_ids_of_fewer_bits_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"ids must be int64 to be hashed, got {dtype}"):
        hash_to_slots(torch.arange(10, dtype=dtype), torch.tensor(5), 7)


def test_mixing_never_merges_two_ids() -> None:
    assert torch.unique(mix(torch.arange(200_000), torch.tensor(salt("a")))).numel() == 200_000


def test_slots_are_uniform_by_chi_square() -> None:
    num_slots, num_ids = 1000, 1_000_000
    slots = hash_to_slots(torch.arange(num_ids), torch.tensor(salt("a")), num_slots)
    expected = num_ids / num_slots
    chi_square = float(((torch.bincount(slots, minlength=num_slots) - expected) ** 2 / expected).sum())
    # Mean 999, standard deviation sqrt(2 * 999) = 44.7.
    assert abs(chi_square - 999) < 5 * np.sqrt(2 * 999)


@pytest.mark.parametrize("num_slots", [2**31, 2**31 + 1, 2**32 - 1, 2**33, 3 * 2**35 + 7, MAX_SLOTS])
def test_many_slots_are_uniform_in_their_first_and_last_bits(num_slots: int) -> None:
    num_ids, num_bins = 1_000_000, 1024
    slots = hash_to_slots(torch.randint(2**63 - 1, (num_ids,)), torch.tensor(salt("a")), num_slots)
    for bins in (slots % num_bins, slots * num_bins // num_slots):
        expected = num_ids / num_bins
        chi_square = float(((torch.bincount(bins, minlength=num_bins) - expected) ** 2 / expected).sum())
        assert abs(chi_square - 1023) < 5 * np.sqrt(2 * 1023)


def test_two_salts_collide_as_independent_hashes_do() -> None:
    ids, num_slots = torch.arange(1_000_000), 1000
    same = hash_to_slots(ids, torch.tensor(salt("a", 0)), num_slots) == hash_to_slots(
        ids, torch.tensor(salt("a", 1)), num_slots
    )
    assert abs(float(same.double().mean()) - 1 / num_slots) < 5 * np.sqrt(1e-3 / 1e6)


def test_number_of_slots_is_checked() -> None:
    with pytest.raises(ValueError, match=r"num_slots must be in \[1, "):
        hash_to_slots(torch.tensor([1]), torch.tensor(1), 0)


@settings(max_examples=100, deadline=None)
@given(
    value=st.integers(0, 2**63 - 1),
    num_slots=st.lists(
        NUM_SLOTS,
        min_size=1,
        max_size=5,
    ),
)
def test_ranges_of_several_sizes_hash_as_each_would_alone(value: int, num_slots: list[int]) -> None:
    salts = torch.arange(len(num_slots)) * 12_345
    prefixes = torch.tensor(slot_prefixes(num_slots))
    sizes = torch.tensor(num_slots)
    slots = hash_to_ranges(torch.tensor([[value]]), salts, sizes, prefixes, most_slots=max(num_slots))
    assert slots.tolist() == [
        [plain_slot(value, int(salt), count) for salt, count in zip(salts, num_slots, strict=True)]
    ]
