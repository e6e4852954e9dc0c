"""What happens to raw numbers and lists before they are written.

Shapes: N rows, L entries of all lists.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Numbers = npt.NDArray[np.float64]
_UNITS_PER_DAY = {"s": 86_400, "ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}


def to_float64(column: pa.Array) -> Numbers:
    """(N,) numbers of any type, null -> NaN."""
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def first_not_finite(values: Numbers, column: pa.Array) -> int | None:
    """Index of the first value that is there and is NaN, infinite or too large for float32; None when all are fine.

    Args:
        values: (N,) what to_float64 made of column.
        column: (N,) raw numbers.
    """
    wrong = ~(np.abs(values) <= np.finfo(np.float32).max) & column.is_valid().to_numpy(zero_copy_only=False)
    return int(wrong.argmax()) if wrong.any() else None


def log1p(values: Numbers) -> npt.NDArray[np.float32]:
    """(N,) -> (N,) float32 log(1 + max(v, 0)); missing (NaN) -> 0. DLRM's rule for Criteo's counts."""
    return np.log1p(np.maximum(np.nan_to_num(values, nan=0.0), 0.0)).astype(np.float32)


def bucket(values: Numbers) -> pa.Array:
    """(N,) -> (N,) int64 categories: floor(ln(v)^2) for v > 2, else int(v); missing (NaN) -> null.

    The rule of the Criteo competition's winners, kept by the public benchmarks with its overlap: 3 and 4 share
    category 1 with the value 1. Values below -2**62 are -2**62.
    """
    missing = np.isnan(values)
    logarithm = np.log(np.maximum(np.where(missing, 0.0, values), 2.0))
    small = np.trunc(np.clip(np.where(missing, 0.0, values), -(2.0**62), 2.0))
    categories = np.where(values > 2.0, np.floor(logarithm * logarithm), small).astype(np.int64)
    return pa.array(categories, mask=missing)


def keep_latest(lists: pa.Array, max_length: int | None) -> tuple[npt.NDArray[np.int32], pa.Array]:
    """(N,) lists -> (N + 1,) int32 offsets and (L,) entries, each list's last ``max_length``; null -> empty."""
    lists = lists.cast(pa.large_list(lists.type.value_type))
    lengths = np.asarray(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), np.int64)
    # flatten() leaves out what null lists may hide in the child array, so starts follow from the lengths alone.
    ends = np.cumsum(lengths)
    kept = lengths if max_length is None else np.minimum(lengths, max_length)
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
    entries = lists.flatten()
    if max_length is not None and (lengths > max_length).any():
        positions = np.arange(offsets[-1]) + np.repeat(ends - kept - offsets[:-1], kept)
        entries = entries.take(pa.array(positions))
    return offsets, entries


def moments_of(column: pa.Array, unit: str) -> tuple[npt.NDArray[np.int64], int]:
    """(N,) integers (in ``unit``), dates or timestamps -> (N,) int64, and how many of its units make a day."""
    if not pa.types.is_integer(column.type):
        column, unit = column.cast(pa.timestamp("us", getattr(column.type, "tz", None))), "us"
    return np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False)), _UNITS_PER_DAY[unit]
