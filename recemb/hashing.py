"""Portable hashes of ids: 64-bit mixing and reduction to slots, equal on every device and in every release.

A hash is part of a model: change one bit of it and every trained row belongs to other ids. The functions here are
frozen by golden vectors in the tests, and use only wrapping 64-bit integer multiplication, shifts and xor.

Shapes: N ids, any shape broadcast against the salts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

# Odd multipliers of the splitmix64 generator and its finaliser (Steele et al., OOPSLA 2014), as signed 64-bit integers.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)

# The product of a hash prefix and a number of slots must stay below 2**63.
MAX_SLOTS = 1 << 40
# With more slots than these, such a prefix has fewer values than there are slots: the bits behind it count too.
_ONE_PREFIX_SLOTS = 1 << 31


def salt(name: str, index: int = 0, seed: int = 0) -> int:
    """A 64-bit salt (signed) from a stable name: the same on every machine and Python, unlike ``hash()``.

    Args:
        name: what the salt belongs to, e.g. a table name.
        index: number of the lookup, when one name needs several independent hashes.
        seed: changes every salt of a model at once.
    """
    digest = hashlib.blake2b(f"{seed}/{index}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mix(ids: Tensor, salts: Tensor) -> Tensor:
    """Scramble int64 ``ids`` with int64 ``salts`` (broadcast) to 64 uniform bits, as int64.

    A bijection of the id for every salt, so distinct ids never collide before the reduction to slots.

    Raises:
        ValueError: ids of another dtype, whose products would wrap around at fewer bits.
    """
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 to be hashed, got {ids.dtype}")
    bits = ids * _GOLDEN_GAMMA
    # Salting after the first multiplication keeps ids of two salts from being shifted copies of each other.
    bits = bits ^ salts if bits.shape != torch.broadcast_shapes(bits.shape, salts.shape) else bits.bitwise_xor_(salts)
    _xor_shift_(bits, 30)
    bits.mul_(_MULTIPLIER_1)
    _xor_shift_(bits, 27)
    bits.mul_(_MULTIPLIER_2)
    return _xor_shift_(bits, 31)


def reduce_to_slots_(bits: Tensor, num_slots: int) -> Tensor:
    """Map 64 uniform bits to slots in [0, num_slots) in place, by multiply-shift (3x faster than modulo on CPU).

    The prefix is as long as the product allows (63 - log2(num_slots) bits; above 2**31 slots twice as many, in two
    products), so no slot is likelier than another by more than num_slots / 2**prefix.
    """
    _check_slots(num_slots)
    prefix = 63 - num_slots.bit_length()
    mask = (1 << prefix) - 1
    carry = None
    if num_slots > _ONE_PREFIX_SLOTS:
        carry = (bits >> (64 - 2 * prefix)).bitwise_and_(mask).mul_(num_slots).bitwise_right_shift_(prefix)
    bits.bitwise_right_shift_(64 - prefix).bitwise_and_(mask).mul_(num_slots)
    if carry is not None:
        bits += carry
    return bits.bitwise_right_shift_(prefix)


def hash_to_slots(ids: Tensor, salts: Tensor, num_slots: int) -> Tensor:
    """int64 ``ids`` and ``salts`` (broadcast) -> int64 slots in [0, num_slots)."""
    return reduce_to_slots_(mix(ids, salts), num_slots)


def hash_to_ranges(ids: Tensor, salts: Tensor, num_slots: Tensor, prefixes: Tensor, *, most_slots: int) -> Tensor:
    """``hash_to_slots`` with a number of slots of its own for every element.

    Args:
        ids, salts: int64, as for ``mix``.
        num_slots: int64 in [1, 2**40], broadcast against ``ids``.
        prefixes: ``slot_prefixes`` of ``num_slots``, computed once.
        most_slots: no element of ``num_slots`` is larger; known without a look at them.
    """
    bits = mix(ids, salts)
    # Halved first, so that the shifts that differ between elements need no masks that differ too.
    bits.bitwise_right_shift_(1).bitwise_and_((1 << 63) - 1)
    carry = None
    if most_slots > _ONE_PREFIX_SLOTS:
        behind = (bits >> (63 - 2 * prefixes).clamp(min=0)) & ((1 << prefixes) - 1)
        carry = (behind * num_slots >> prefixes) * (num_slots > _ONE_PREFIX_SLOTS)
    bits.bitwise_right_shift_(63 - prefixes).mul_(num_slots)
    if carry is not None:
        bits += carry
    return bits.bitwise_right_shift_(prefixes)


def slot_prefixes(num_slots: Sequence[int]) -> list[int]:
    """Bits of a hash that are multiplied with each number of slots, as long as the product stays below 2**63."""
    for slots in num_slots:
        _check_slots(slots)
    return [63 - slots.bit_length() for slots in num_slots]


def _check_slots(num_slots: int) -> None:
    if not 1 <= num_slots <= MAX_SLOTS:
        raise ValueError(f"num_slots must be in [1, {MAX_SLOTS}], got {num_slots}")


def _xor_shift_(bits: Tensor, shift: int) -> Tensor:
    # Torch shifts int64 arithmetically; the mask makes the shift logical.
    return bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (64 - shift)) - 1))
