"""Which rows a rank reads in an epoch, in which order: plain arithmetic on row counts, no data is touched.

The order of the row groups is drawn from (seed, epoch). Their rows, in that order, are one long sequence; rank r of W
owns positions ``N * r // W`` to ``N * (r + 1) // W`` of it, so ranks neither overlap nor leave rows out, and their
shares differ by one row at most. A rank cuts its share in *windows* of a few row groups, whose rows are mixed.

An epoch may be continued by another number of ranks. Nothing above changes then: what each of the first ranks had left
of its order makes, rank after rank, one sequence, which is cut in equal shares again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recemb.data.manifest import FILE_NAME, Manifest


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group: ``file`` is the position in the split, ``first_row`` the row of the file at which it begins."""

    file: int
    index: int
    rows: int
    first_row: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows ``start`` to ``stop`` of a row group: all of it, but for those at the two ends of a rank's share."""

    row_group: RowGroup
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Span:
    """Rows ``start`` to ``stop`` of the order of ``rank``, one of the ranks with which the epoch was begun."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Window:
    """Segments that are in memory together and are mixed.

    Args:
        rank: whose share it is cut from; part of the seed of the mix.
        number: position among the windows of the rank and epoch; part of the seed of the mix.
        first_row: rows of the rank's share that come before.
        rows: rows of all segments.
    """

    rank: int
    number: int
    first_row: int
    rows: int
    segments: tuple[Segment, ...]


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not Parquet, or its footer cannot be read (a truncated file).
    """
    try:
        # Without pre_buffer, which keeps the compressed pages of all columns that were read until the file is closed.
        return pq.ParquetFile(path, pre_buffer=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: listed in {FILE_NAME}, not on disk") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: truncated or replaced ({error})") from error


def row_groups_of(file: pq.ParquetFile, number: int) -> list[RowGroup]:
    """The row groups of one open file that have rows; ``number`` is the file's position in its split."""
    found = []
    first_row = 0
    for index in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(index).num_rows
        if rows:
            found.append(RowGroup(number, index, rows, first_row))
        first_row += rows
    return found


def check_row_count(manifest: Manifest, split: str, number: int, file: pq.ParquetFile) -> None:
    """Raise ValueError where a file has another number of rows than the manifest says."""
    expected = manifest.split(split).files[number]
    found = file.metadata.num_rows
    if found != expected.rows:
        raise ValueError(f"{manifest.root / expected.path}: {expected.rows} rows in {FILE_NAME}, {found} in the file")


def share_of(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and one past the last row of a rank, among ``rows`` rows."""
    return rows * rank // world_size, rows * (rank + 1) // world_size


def spans_of(rows: int, world_size: int, earlier: Sequence[tuple[int, int]]) -> list[list[Span]]:
    """Which rows of an epoch each rank reads, in order.

    Args:
        rows: of the split.
        world_size: ranks that read now.
        earlier: ranks that began the epoch, and others that went on before the present ones: each as (number of them,
            rows that each had taken when they ended; more than it had means all).
    """
    worlds = [*(world for world, _ in earlier), world_size]
    shares = [share_of(rows, rank, worlds[0]) for rank in range(worlds[0])]
    spans = [[Span(rank, 0, last - first)] for rank, (first, last) in enumerate(shares)]
    for world, (_, taken) in zip(worlds[1:], earlier, strict=True):
        rest = [span for of_rank in spans for span in cut_spans(of_rank, taken, rows)]
        left = sum(span.stop - span.start for span in rest)
        spans = [cut_spans(rest, *share_of(left, rank, world)) for rank in range(world)]
    return spans


def cut_spans(spans: Sequence[Span], first: int, last: int) -> list[Span]:
    """Rows ``first`` to ``last`` of the sequence that ``spans`` make."""
    result = []
    for span in spans:
        start, stop = span.start + max(first, 0), min(span.start + last, span.stop)
        if start < stop:
            result.append(Span(span.rank, start, stop))
        first, last = first - (span.stop - span.start), last - (span.stop - span.start)
    return result


def order_of(row_groups: Sequence[RowGroup], *, shuffle: bool, seed: int, epoch: int) -> list[RowGroup]:
    """The row groups in the order of an epoch, equal on every rank."""
    if not shuffle:
        return list(row_groups)
    order = np.random.default_rng([seed, epoch]).permutation(len(row_groups))
    return [row_groups[position] for position in order]


def plan_windows(row_groups: Sequence[RowGroup], rank: int, world_size: int, window_rows: int) -> list[Window]:
    """Cut the share of a rank of the ordered row groups into windows.

    A window takes row groups while their rows (whole row groups: that is what is read) stay within ``window_rows``,
    and always at least one.
    """
    first, last = share_of(sum(group.rows for group in row_groups), rank, world_size)
    windows: list[Window] = []
    segments: list[Segment] = []
    read_rows = 0
    begins = itertools.accumulate((group.rows for group in row_groups), initial=0)
    for group, begin in zip(row_groups, begins, strict=False):
        start, stop = max(first - begin, 0), min(last - begin, group.rows)
        if start >= stop:
            continue
        if segments and read_rows + group.rows > window_rows:
            _close(windows, rank, segments)
            segments, read_rows = [], 0
        segments.append(Segment(group, start, stop))
        read_rows += group.rows
    if segments:
        _close(windows, rank, segments)
    return windows


def _close(windows: list[Window], rank: int, segments: Sequence[Segment]) -> None:
    first_row = windows[-1].first_row + windows[-1].rows if windows else 0
    rows = sum(segment.stop - segment.start for segment in segments)
    windows.append(Window(rank, len(windows), first_row, rows, tuple(segments)))
