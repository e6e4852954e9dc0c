"""Which row goes to train, validation or test.

Shapes: N rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "validation", "test")
SplitKind = Literal["random", "time", "last-day", "users", "given"]
# Kinds that any log can be asked for; "users" needs a user column, "given" is a protocol's own.
GENERAL_KINDS: tuple[SplitKind, ...] = ("random", "time", "last-day")

_HISTOGRAM_BUCKETS = 1 << 16
Keys = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SplitRule:
    """How a log is divided.

    Args:
        kind: ``"random"``: each row by a hash of its number and the seed, so shares are met up to chance;
            ``"time"``: the oldest rows train, the next validate, the newest test, by the log's time column or, where
            there is none, by the order of rows and files (rows of one moment are never divided);
            ``"last-day"``: all days but the last train; of the last day's rows, the first half validates and the second
            tests. A day is a file where several are given, or the day of the time column;
            ``"users"``: all rows of a user by a hash of the user column and the seed, so shares of users are met up to
            chance; test users are strangers to training. The only kind beside time that keeps rows with histories
            apart: by ``"random"``, the histories of train rows hold events that test rows ask for;
            ``"given"``: by a column of 0, 1 and 2 that the pipeline makes.
        fractions: shares of train, validation and test, as any positive weights: (8, 1, 1). Unused by last-day, given.
        seed: of ``"random"`` and ``"users"``.
    """

    kind: SplitKind = "random"
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(SplitKind):
            raise ValueError(f"split: must be one of {list(get_args(SplitKind))}, got {self.kind!r}")
        if len(self.fractions) != 3 or not all(np.isfinite(share) and share > 0 for share in self.fractions):
            raise ValueError(f"split: fractions must be three positive numbers (8:1:1), got {self.fractions}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"split: seed must be in [0, 2**64), got {self.seed}")

    @classmethod
    def of(
        cls, kind: SplitKind, fractions: tuple[float, float, float] | None = None, seed: int | None = None
    ) -> SplitRule:
        """A rule from what a user gave (None: nothing); a setting that ``kind`` would ignore is an error.

        Raises:
            ValueError: fractions for last-day or given, a seed where nothing is drawn, or a value that makes no sense.
        """
        if kind == "given" and fractions is not None:
            raise ValueError("split given: takes no fractions, the rows say where they belong")
        if kind == "last-day" and fractions is not None:
            raise ValueError("split last-day: takes no fractions, the last day is halved")
        if kind not in ("random", "users") and seed is not None:
            raise ValueError(f"split {kind}: takes no seed, only random and users do")
        return cls(kind, fractions or cls.fractions, seed or 0)

    @property
    def cumulative(self) -> tuple[float, float]:
        """Shares of all rows at which validation and test begin."""
        train, validation, test = self.fractions
        total = train + validation + test
        return train / total, (train + validation) / total


@dataclass(frozen=True)
class RowKeys:
    """What a split needs to know of a chunk's rows.

    Args:
        first_row: number of its first row in the whole log.
        num_rows: N.
        keys: (N,) int64: moments (None where rows are in time order), hashes of users or given split numbers.
        days: (N,) int64 days, or one for all rows, None where no split asks.
    """

    first_row: int
    num_rows: int
    keys: Keys | None = None
    days: Keys | int | None = None

    def moments(self) -> Keys:
        """(N,) int64 that order the log."""
        return np.arange(self.first_row, self.first_row + self.num_rows) if self.keys is None else self.keys


# Calling it gives a fresh pass over the log's chunks.
Pass = Callable[[], Iterator[RowKeys]]


@dataclass(frozen=True)
class Assignment:
    """A split rule with its boundaries found: rows -> 0 (train), 1 (validation), 2 (test).

    Args:
        rule: the rule.
        boundaries: moments at which validation and test begin (time, last-day).
        last_day: the day that is not trained on (last-day).
    """

    rule: SplitRule
    boundaries: tuple[int, int] = (0, 0)
    last_day: int | None = None

    def of(self, rows: RowKeys) -> npt.NDArray[np.int8]:
        """(N,) int8 split numbers."""
        if self.rule.kind == "random":
            return self._draw(np.arange(rows.first_row, rows.first_row + rows.num_rows, dtype=np.uint64))
        moments = rows.moments()
        if self.rule.kind == "users":
            return self._draw(np.asarray(moments, np.int64).view(np.uint64))
        if self.rule.kind == "given":
            return np.asarray(moments, np.int8)
        validation, test = self.boundaries
        if self.last_day is not None:
            held_out = _mask(rows, self.last_day)
            return np.where(held_out, 1 + (moments >= test), 0).astype(np.int8)
        return (moments >= validation).astype(np.int8) + (moments >= test)

    def _draw(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.int8]:
        draws = mix(numbers + mix(np.array([self.rule.seed], np.uint64)))
        fractions = (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
        validation, test = self.rule.cumulative
        return (fractions >= validation).astype(np.int8) + (fractions >= test)


def mix(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function: a bijection of 64-bit numbers whose bits look independent."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def assign(rule: SplitRule, passes: Pass) -> Assignment:
    """Find a rule's boundaries in a log. Memory does not grow with the log: a few passes over the moments.

    Raises:
        ValueError: last-day where the log has one day only.
    """
    if rule.kind in ("random", "users", "given"):
        return Assignment(rule)
    if rule.kind == "time":
        first, second = select(passes, rule.cumulative)
        return Assignment(rule, (first, second))
    days = {int(day) for rows in passes() for day in np.unique(np.asarray(rows.days))}
    if len(days) < 2:
        raise ValueError(
            f"split last-day: the log has {len(days)} day; at least 2 are required. Use split time with fractions"
        )
    last_day = max(days)
    (half,) = select(passes, (0.5,), last_day)
    return Assignment(rule, (half, half), last_day)


def select(passes: Pass, fractions: Sequence[float], day: int | None = None) -> list[int]:
    """Moments at the given ranks (shares of all rows, or of the rows of ``day``), exactly, in bounded memory.

    Each rank's interval is cut into 65,536 buckets until a bucket holds one moment: at most 4 passes for 64 bits.
    """
    low, high, count = 2**63 - 1, -(2**63), 0
    for rows in passes():
        moments = _chosen(rows, day)
        if len(moments):
            low, high, count = min(low, int(moments.min())), max(high, int(moments.max())), count + len(moments)
    # Truncation after a hair: 0.8 + 0.1 is a little below 0.9, and 0.9 * 80,000 must still be 72,000.
    ranks = [min(int(share * count + 1e-6), count - 1) for share in fractions]
    return [_select_one(passes, rank, low, high, day) for rank in ranks]


def _select_one(passes: Pass, rank: int, low: int, high: int, day: int | None) -> int:
    while low < high:
        width = (high - low) // _HISTOGRAM_BUCKETS + 1
        counts = np.zeros(_HISTOGRAM_BUCKETS, np.int64)
        for rows in passes():
            moments = _chosen(rows, day)
            inside = moments[(moments >= low) & (moments <= high)]
            # Differences of two int64 can pass 2**63, so they are taken modulo 2**64.
            distance = inside.view(np.uint64) - np.array(low, np.int64).view(np.uint64)
            counts += np.bincount((distance // np.uint64(width)).astype(np.int64), minlength=_HISTOGRAM_BUCKETS)
        ends = np.cumsum(counts)
        bucket = int(np.searchsorted(ends, rank, side="right"))
        rank -= int(ends[bucket] - counts[bucket])
        low, high = low + bucket * width, min(high, low + (bucket + 1) * width - 1)
    return low


def _chosen(rows: RowKeys, day: int | None) -> Keys:
    return rows.moments() if day is None else rows.moments()[_mask(rows, day)]


def _mask(rows: RowKeys, day: int) -> npt.NDArray[np.bool_]:
    return np.broadcast_to(np.asarray(rows.days) == day, (rows.num_rows,))
