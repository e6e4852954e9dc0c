"""Streams the Parquet files of an encoded data set as batches: shuffled, sharded by rank, resumable at any batch.

A background thread decodes the next window of row groups while batches are cut from the present one.
"""

from __future__ import annotations

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
    Window,
    check_row_count,
    open_parquet,
    order_of,
    plan_windows,
    row_groups_of,
    share_of,
)
from recemb.data.window import Rows, WindowBuffers, assemble, make_layout

SHUFFLE_BUFFER_ROWS = 262_144
# Window of an unshuffled loader: one row group of the format, more when they are smaller.
READ_ROWS = 65_536
STATE_VERSION = 1


class ParquetLoader:
    """Batches of one split; every row comes exactly once an epoch, on exactly one rank.

    Order: with ``shuffle``, row groups in an order drawn from (seed, epoch), then the rows of every window of
    ``shuffle_buffer_rows`` in an order drawn from (seed, epoch, rank, window). Without, the order of the files.

    Ranks: the rows are cut in ``world_size`` shares whose sizes differ by one at most, and every rank takes the same
    number of batches. So that none of them is empty, the last batch of a rank may hold ``batch_size + 1`` rows. A split
    of fewer rows than ranks is an error: a rank without rows would average its loss over nothing. A row group that
    lies across two shares is read by both.

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
        # Batches of the epoch that were handed out.
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
    def epoch(self) -> int:
        """The epoch that is being read, or will be: it advances when an iterator is exhausted."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; iterators that were begun before are void."""
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        self._epoch, self._batch = epoch, 0
        self._iteration += 1

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer is: JSON-able, equal on all ranks that took the same number of batches.

        Batches that were read ahead do not count. After the last batch of an epoch, before the iterator ended, it
        points at the end of that epoch: the iterator of the resumed loader then ends at once.
        """
        return {**self._identity(), "epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; only the window in which it lies is read again.

        Raises:
            ValueError: the state is of other files or another order (batch size, world size, seed, shuffling), which
                would repeat rows and leave others out.
        """
        identity = self._identity()
        missing = [key for key in (*identity, "epoch", "batch") if key not in state]
        if missing:
            raise ValueError(f"loader state must have {missing}, got {sorted(state)}")
        changed = [f"{key} was {state[key]!r}, is {identity[key]!r}" for key in identity if state[key] != identity[key]]
        if changed:
            raise ValueError(f"cannot resume the loader of split {self._split!r}: {'; '.join(changed)}")
        if not 0 <= state["batch"] <= len(self):
            raise ValueError(f"loader state: batch must be in [0, {len(self)}], got {state['batch']}")
        self.set_epoch(state["epoch"])
        self._batch = state["batch"]

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the present epoch; an exhausted iterator leaves the loader at the next one.

        One iterator at a time: beginning another, or moving the loader, voids the one before.
        """
        self._iteration += 1
        return self._batches(self._iteration)

    def _batches(self, iteration: int) -> Iterator[Batch]:
        # The last batch may be longer than the others, so the end is not a multiple of the batch size.
        position = self.num_rows if self._batch == len(self) else self._batch * self._batch_size
        windows = [window for window in self._windows() if window.first_row + window.rows > position]
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
            needed = self._batch_rows(self._batch)
            for window in stream:
                offset = max(position - window.first_row, 0)
                while offset < window.rows:
                    taken = min(needed, window.rows - offset)
                    pieces.append(window.cut(offset, offset + taken))
                    offset, needed, position = offset + taken, needed - taken, position + taken
                    if not needed:
                        self._check_current(iteration)
                        self._batch += 1
                        yield assemble(self._layout, pieces)
                        pieces, needed = [], self._batch_rows(self._batch)
        finally:
            stream.close()
            reader.close()
            self._buffers = buffers
        self._check_current(iteration)
        self._epoch, self._batch = epoch + 1, 0

    def _batch_rows(self, batch: int) -> int:
        return self._batch_size if batch < len(self) - 1 else self.num_rows - batch * self._batch_size

    def _check_current(self, iteration: int) -> None:
        if iteration != self._iteration:
            raise RuntimeError(
                f"loader of split {self._split!r}: this iterator is void, another was begun or the loader was moved"
            )

    def _windows(self) -> list[Window]:
        order = order_of(self._row_groups, shuffle=self._shuffle, seed=self._seed, epoch=self._epoch)
        first, last = share_of(self._total_rows, self._rank, self._world_size)
        return plan_windows(order, first, last, self._window_rows)

    def _mix(self, epoch: int, window: Window) -> np.ndarray | None:
        if not self._shuffle:
            return None
        generator = np.random.default_rng([self._seed, epoch, self._rank, window.number])
        # 32 bits leave more of the cache to the columns that are gathered.
        return generator.permutation(window.rows).astype(np.int32)

    def _identity(self) -> dict[str, Any]:
        files = self._manifest.split(self._split).files
        content = "\n".join(f"{file.checksum} {file.rows}" for file in files)
        return {
            "version": STATE_VERSION,
            "split": self._split,
            "files": xxhash.xxh3_64_hexdigest(content.encode()),
            "batch_size": self._batch_size,
            "world_size": self._world_size,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "window_rows": self._window_rows,
        }


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
