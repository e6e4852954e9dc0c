"""Streams the Parquet files of an encoded data set as batches: shuffled, sharded by rank, resumable at any batch.

A background thread decodes the next window of row groups while batches are cut from the present one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from recemb.data.batch import Batch
from recemb.data.columns import Column, check_schema, model_columns
from recemb.data.decode import WindowReader
from recemb.data.manifest import Manifest
from recemb.data.prefetch import prefetched_windows
from recemb.data.row_groups import (
    RowGroup,
    Span,
    Window,
    check_row_count,
    cut_spans,
    open_parquet,
    order_of,
    plan_windows,
    row_groups_of,
    share_of,
    spans_of,
)
from recemb.data.window import Rows, WindowBuffers, assemble, make_layout

SHUFFLE_BUFFER_ROWS = 262_144
# Window of an unshuffled loader: one row group of the format, more when they are smaller.
READ_ROWS = 65_536
STATE_VERSION = 2


class ParquetLoader:
    """Batches of one split; every row comes exactly once an epoch, on exactly one rank.

    Order: with ``shuffle``, row groups in an order drawn from (seed, epoch), then the rows of every window of
    ``shuffle_buffer_rows`` in an order drawn from (seed, epoch, rank, window). Without, the order of the files.

    Ranks: the rows are cut in ``world_size`` shares whose sizes differ by one at most, and every rank takes the same
    number of batches. So that none of them is empty, the last batch of a rank may hold ``batch_size + 1`` rows. A split
    of fewer rows than ranks is an error: a rank without rows would average its loss over nothing. A row group that
    lies across two shares is read by both. Another number of ranks may go on with an epoch, see ``load_state_dict``.

    Memory: with R = max(shuffle_buffer_rows, rows of the largest row group), at most
    ``2 * R * (4 * numeric + 4 or 8 * single ids + 1)`` bytes of decoded windows (one consumed, one filled behind it),
    ``12 * R`` of row order, 2 MiB or one column of R rows (the larger) of what is being decoded with its compressed
    pages, and two batches: 91 MB for Criteo's 39 features at the default. A list column adds 36 bytes a row and three
    times the bytes of a window's whole lists; an extra column twice its numpy bytes (strings are Python objects, 60
    bytes and more). The number of rows in the split adds one small record per row group, nothing else. The
    windows' memory is kept for the next epoch: touching new memory took 5% of an epoch of 4 million rows.

    Args:
        manifest: the data set.
        split: name of one of its splits.
        batch_size: rows of a batch on this rank.
        shuffle: see Order.
        seed: of the order; equal on all ranks.
        rank, world_size: this process among those that share the split.
        extra_columns: columns to hand out as numpy arrays in ``Batch.extra``; any flat column without nulls.
        shuffle_buffer_rows: rows that are mixed with each other; more mixes better, costs memory and the wait for the
            first batch. Row groups are never split, so it is rounded down to whole ones, one at least.

    Raises:
        FileNotFoundError, ValueError: arguments out of range; a file missing, truncated, with another number of rows
            than the manifest says, without a column or with one of another type. Values are checked as they are read,
            by the iterator: the error names file, row group, column, row, what is required and what came.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        extra_columns: Sequence[str] = (),
        shuffle_buffer_rows: int = SHUFFLE_BUFFER_ROWS,
    ) -> None:
        _check_arguments(batch_size, seed, rank, world_size, shuffle_buffer_rows)
        self._manifest = manifest
        self._split = split
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._window_rows = shuffle_buffer_rows if shuffle else READ_ROWS
        columns = model_columns(manifest)
        self._row_groups, wide = _read_footers(manifest, split, columns, extra_columns)
        self._layout = make_layout(columns, wide, tuple(dict.fromkeys(extra_columns)))
        self._total_rows = sum(group.rows for group in self._row_groups)
        if self._total_rows < world_size:
            raise ValueError(
                f"{manifest.root}: split {split!r} has {self._total_rows} rows; it needs one at least for each of "
                f"world_size={world_size} ranks"
            )
        self._epoch = 0
        # Of the present epoch: other numbers of ranks that read the first part of it, as (ranks, rows each took).
        self._earlier: list[tuple[int, int]] = []
        # Batches handed out since then.
        self._batch = 0
        self._iteration = 0
        # Of the iterator that ended last: memory that is mapped already.
        self._buffers: list[WindowBuffers] = []

    def __len__(self) -> int:
        """Batches of an epoch, equal on every rank."""
        smallest_share = self._total_rows // self._world_size
        return -(-smallest_share // self._batch_size)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch on this rank."""
        first, last = share_of(self._total_rows, self._rank, self._world_size)
        return last - first

    @property
    def batch_size(self) -> int:
        """Rows of a full batch of this rank."""
        return self._batch_size

    @property
    def batches_left(self) -> int:
        """Batches of the present epoch that were not handed out, equal on every rank."""
        return self._num_batches(self._world_size, self._batch_size, self._earlier) - self._batch

    @property
    def epoch(self) -> int:
        """The epoch that is being read, or will be: it advances when an iterator is exhausted."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; iterators that were begun before are void."""
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        self._epoch, self._batch, self._earlier = epoch, 0, []
        self._iteration += 1

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer is: JSON-able, equal on all ranks that took the same number of batches.

        Batches that were read ahead do not count. After the last batch of an epoch, before the iterator ended, it
        points at the end of that epoch: the iterator of the resumed loader then ends at once.
        """
        return {
            **self._identity(),
            "batch_size": self._batch_size,
            "world_size": self._world_size,
            "epoch": self._epoch,
            "earlier": [list(part) for part in self._earlier],
            "batch": self._batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; only the window in which it lies is read again.

        With the same number of ranks (and batch size), batch by batch as if there had been no interruption. With
        another number, and any batch size, the rows that the first ranks had not taken of the epoch come exactly once,
        each on one of the present ranks, whose shares differ by one row at most. Later epochs are as if the present
        ranks had begun.

        Raises:
            ValueError: the state is of other files or another order (seed, shuffling; for as many ranks the batch
                size), which would repeat rows and leave others out; or fewer rows are left in the epoch than there are
                ranks now.
        """
        expected = self.state_dict()
        if missing := [key for key in expected if key not in state]:
            raise ValueError(f"loader state must have {missing}, got {sorted(state)}")
        same_ranks = state["world_size"] == self._world_size
        compared = [*self._identity(), *(["batch_size"] if same_ranks else [])]
        changed = [f"{key} was {state[key]!r}, is {expected[key]!r}" for key in compared if state[key] != expected[key]]
        if changed:
            raise ValueError(f"cannot resume the loader of split {self._split!r}: {'; '.join(changed)}")
        earlier = [(int(ranks), int(taken)) for ranks, taken in state["earlier"]]
        batches = self._num_batches(state["world_size"], state["batch_size"], earlier)
        if not 0 <= state["batch"] <= batches:
            raise ValueError(f"loader state: batch must be in [0, {batches}], got {state['batch']}")
        if not same_ranks:
            # The last batch of an epoch may be longer than the others.
            is_over = state["batch"] == batches
            taken = self._total_rows if is_over else state["batch"] * state["batch_size"]
            earlier.append((state["world_size"], taken))
            shares = [_rows(spans) for spans in spans_of(self._total_rows, self._world_size, earlier)]
            if not is_over and 0 in shares:
                raise ValueError(
                    f"cannot resume the loader of split {self._split!r}: the epoch has {sum(shares)} rows left, it "
                    f"needs one at least for each of world_size={self._world_size} ranks"
                )
        self.set_epoch(state["epoch"])
        self._earlier, self._batch = earlier, state["batch"] if same_ranks else 0

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the present epoch; an exhausted iterator leaves the loader at the next one.

        One iterator at a time: beginning another, or moving the loader, voids the one before.
        """
        self._iteration += 1
        return self._batches(self._iteration)

    def _batches(self, iteration: int) -> Iterator[Batch]:
        parts = self._parts()
        windows = [window for window, _, _ in parts]
        capacity = max((window.rows for window in windows), default=0)
        reader = WindowReader(self._manifest.files(self._split), self._layout)
        epoch = self._epoch

        def fill(buffers: WindowBuffers, window: Window) -> None:
            reader.fill(buffers, window, self._mix(epoch, window))

        # Taken, so that an iterator begun before this one ended makes its own.
        buffers, self._buffers = self._buffers, []
        if len(buffers) != min(2, len(windows)) or any(buffer.capacity < capacity for buffer in buffers):
            buffers = [WindowBuffers(self._layout, capacity) for _ in range(min(2, len(windows)))]
        stream = prefetched_windows(windows, buffers, fill)
        try:
            pieces: list[Rows] = []
            sizes = self._batch_sizes()
            needed = next(sizes, 0)
            for window, (_, offset, stop) in zip(stream, parts, strict=False):
                while offset < stop:
                    taken = min(needed, stop - offset)
                    pieces.append(window.cut(offset, offset + taken))
                    offset, needed = offset + taken, needed - taken
                    if not needed:
                        self._check_current(iteration)
                        self._batch += 1
                        yield assemble(self._layout, pieces)
                        pieces, needed = [], next(sizes, 0)
        finally:
            stream.close()
            reader.close()
            self._buffers = buffers
        self._check_current(iteration)
        self._epoch, self._batch, self._earlier = epoch + 1, 0, []

    def _num_batches(self, world_size: int, batch_size: int, earlier: Sequence[tuple[int, int]]) -> int:
        """Batches that each of ``world_size`` ranks reads of an epoch after ``earlier`` ones."""
        smallest_share = min(_rows(spans) for spans in spans_of(self._total_rows, world_size, earlier))
        return -(-smallest_share // batch_size)

    def _rest(self) -> list[Span]:
        """What is left of the present epoch on this rank."""
        spans = spans_of(self._total_rows, self._world_size, self._earlier)[self._rank]
        # The last batch may be longer than the others, so the end is not a multiple of the batch size.
        taken = self._batch * self._batch_size if self.batches_left else self._total_rows
        return cut_spans(spans, taken, self._total_rows)

    def _batch_sizes(self) -> Iterator[int]:
        left = self.batches_left
        if not left:
            return iter(())
        last = _rows(self._rest()) - (left - 1) * self._batch_size
        return itertools.chain(itertools.repeat(self._batch_size, left - 1), [last])

    def _check_current(self, iteration: int) -> None:
        if iteration != self._iteration:
            raise RuntimeError(
                f"loader of split {self._split!r}: this iterator is void, another was begun or the loader was moved"
            )

    def _parts(self) -> list[tuple[Window, int, int]]:
        """The windows in which the rest of the epoch lies, each with its first and one past its last row of it."""
        order = order_of(self._row_groups, shuffle=self._shuffle, seed=self._seed, epoch=self._epoch)
        first_ranks = self._earlier[0][0] if self._earlier else self._world_size
        return [
            (window, max(span.start - window.first_row, 0), min(span.stop - window.first_row, window.rows))
            for span in self._rest()
            for window in plan_windows(order, span.rank, first_ranks, self._window_rows)
            if window.first_row < span.stop and span.start < window.first_row + window.rows
        ]

    def _mix(self, epoch: int, window: Window) -> np.ndarray | None:
        if not self._shuffle:
            return None
        generator = np.random.default_rng([self._seed, epoch, window.rank, window.number])
        # 32 bits leave more of the cache to the columns that are gathered.
        return generator.permutation(window.rows).astype(np.int32)

    def _identity(self) -> dict[str, Any]:
        files = self._manifest.split(self._split).files
        content = "\n".join(f"{file.checksum} {file.rows}" for file in files)
        return {
            "version": STATE_VERSION,
            "split": self._split,
            "files": xxhash.xxh3_64_hexdigest(content.encode()),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "window_rows": self._window_rows,
        }


def _rows(spans: Sequence[Span]) -> int:
    return sum(span.stop - span.start for span in spans)


def _check_arguments(batch_size: int, seed: int, rank: int, world_size: int, shuffle_buffer_rows: int) -> None:
    for name, value in (("batch_size", batch_size), ("world_size", world_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if shuffle_buffer_rows < 1:
        raise ValueError(f"shuffle_buffer_rows must be at least 1, got {shuffle_buffer_rows}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}) (world_size), got {rank}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")


def _read_footers(
    manifest: Manifest, split: str, columns: Sequence[Column], extra_columns: Sequence[str]
) -> tuple[list[RowGroup], frozenset[str]]:
    """The row groups of a split, and its single-id columns of which some file has 64-bit ids."""
    wanted = [*columns, *(Column(name, "extra") for name in extra_columns)]
    row_groups: list[RowGroup] = []
    wide: set[str] = set()
    for number, path in enumerate(manifest.files(split)):
        with open_parquet(path) as file:
            check_row_count(manifest, split, number, file)
            check_schema(file.schema_arrow, wanted, path)
            row_groups += row_groups_of(file, number)
            wide |= {
                column.name
                for column in columns
                if column.role == "single" and file.schema_arrow.field(column.name).type.bit_width == 64
            }
    return row_groups, frozenset(wide)
