"""Portable 64-bit hash of raw values: ids in [0, 2**63) without a vocabulary.

The hash is XXH64 (seed 0) shifted right by one bit, so any language can compute it at serving time:

- string: of its UTF-8 bytes;
- integer: of its 8 bytes, little-endian two's complement;
- missing: id 0 (a value that hashes to 0 as well is one in 2**63).

Part of the format of a data set and of every model trained on it: golden tests freeze it.

Shapes: N values, W whole 8-byte words of one value.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

MISSING_ID = 0
# Longer strings take XXH64's four-lane loop, which is not worth vectorising: they go through the C library one by one.
_VECTORISED_BYTES = 31
_PRIMES = tuple(
    np.uint64(prime)
    for prime in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)

Words = npt.NDArray[np.uint64]


def hash_values(values: pa.Array) -> npt.NDArray[np.int64]:
    """(N,) string or integer values, possibly null -> (N,) int64 ids in [0, 2**63)."""
    if pa.types.is_integer(values.type):
        # Integers are hashed as 64 bits whatever width the file stored them in.
        wide = values.cast(pa.uint64() if values.type == pa.uint64() else pa.int64()).fill_null(0)
        words = np.ascontiguousarray(wide.to_numpy(zero_copy_only=False)).view(np.uint64)
        hashes = _xxh64_of_words(words[:, None])
    else:
        hashes = _hash_strings(values.cast(pa.large_string()))
    ids = (hashes >> np.uint64(1)).astype(np.int64)
    if values.null_count:
        ids[values.is_null().to_numpy(zero_copy_only=False)] = MISSING_ID
    return ids


def _hash_strings(values: pa.Array) -> Words:
    """(N,) large_string -> (N,) uint64 XXH64, grouped by length so that every step is one numpy expression."""
    _, offsets_buffer, data = values.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[values.offset : values.offset + len(values) + 1]
    content = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    starts, lengths = offsets[:-1], np.diff(offsets)
    hashes = np.empty(len(values), np.uint64)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        positions = starts[rows]
        if length <= _VECTORISED_BYTES:
            columns = content[positions[:, None] + np.arange(length)]
            hashes[rows] = _xxh64_short(columns)
        else:
            hashes[rows] = [xxhash.xxh64_intdigest(content[at : at + length].tobytes()) for at in positions]
    return hashes


def _xxh64_of_words(words: Words) -> Words:
    """(N, W) uint64 -> (N,) XXH64 of the 8 * W bytes of each row, W <= 3."""
    return _xxh64_short(np.ascontiguousarray(words.astype("<u8")).view(np.uint8))


def _xxh64_short(content: npt.NDArray[np.uint8]) -> Words:
    """(N, length) bytes -> (N,) XXH64 with seed 0, for length < 32."""
    length = content.shape[1]
    first, second, third, fourth, fifth = _PRIMES
    hashes = np.full(len(content), fifth + np.uint64(length), np.uint64)
    at = 0
    while at + 8 <= length:
        word = np.ascontiguousarray(content[:, at : at + 8]).view("<u8")[:, 0]
        hashes ^= _rotate(word * second, 31) * first
        hashes = _rotate(hashes, 27) * first + fourth
        at += 8
    if at + 4 <= length:
        half = np.ascontiguousarray(content[:, at : at + 4]).view("<u4")[:, 0].astype(np.uint64)
        hashes ^= half * first
        hashes = _rotate(hashes, 23) * second + third
        at += 4
    for column in range(at, length):
        hashes ^= content[:, column].astype(np.uint64) * fifth
        hashes = _rotate(hashes, 11) * first
    hashes ^= hashes >> np.uint64(33)
    hashes *= second
    hashes ^= hashes >> np.uint64(29)
    hashes *= third
    return hashes ^ (hashes >> np.uint64(32))


def _rotate(words: Words, bits: int) -> Words:
    return (words << np.uint64(bits)) | (words >> np.uint64(64 - bits))
