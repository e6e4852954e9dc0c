"""Rows of a few row groups in memory, already in their final order, and how batches are cut from them.

Shapes: R rows of the window, B rows of a batch, I numeric features, F features of a block, L entries of lists.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from recemb.data.batch import Batch, keyed_bags, keyed_one_id
from recemb.data.columns import Column


@dataclass
class IdBlock:
    """Neighbouring single-id features of one integer width: ``ids_FR`` (F, R), int32 or int64 as on disk."""

    ids_FR: np.ndarray


@dataclass
class BagBlock:
    """One list feature: row i of the window is ``values_L[starts_R[i] : starts_R[i] + lengths_R[i]]``."""

    starts_R: np.ndarray
    lengths_R: np.ndarray
    values_L: np.ndarray


@dataclass(frozen=True)
class Layout:
    """Where the columns of a data set go in a window.

    Args:
        columns: label, numeric and categorical columns in model order.
        wide: names of the single-id columns that need int64.
        blocks: feature names of each block, in model order; a list feature is a block of its own.
        places: feature name to (block, row of the block).
        extra: names of the extra columns.
    """

    columns: tuple[Column, ...]
    wide: frozenset[str]
    blocks: tuple[tuple[str, ...], ...]
    places: Mapping[str, tuple[int, int]]
    extra: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        return [name for block in self.blocks for name in block]

    @property
    def numeric(self) -> list[str]:
        return [column.name for column in self.columns if column.role == "numeric"]


def make_layout(columns: Sequence[Column], wide: frozenset[str], extra: Sequence[str]) -> Layout:
    """Group neighbouring single-id columns of one width, so that a batch is cut with one copy per group."""

    def kind(column: Column) -> str:
        if column.role == "jagged":
            return column.name
        return "wide" if column.name in wide else "narrow"

    features = [column for column in columns if column.role in ("single", "jagged")]
    # A list column named "wide" must not join its neighbours, so the role is part of the key.
    grouped = itertools.groupby(features, key=lambda column: (column.role, kind(column)))
    blocks = tuple(tuple(column.name for column in group) for _, group in grouped)
    places = {name: (block, row) for block, names in enumerate(blocks) for row, name in enumerate(names)}
    return Layout(tuple(columns), wide, blocks, places, tuple(extra))


@dataclass
class WindowBuffers:
    """Memory of one window, filled again and again: fresh memory would cost a page fault every 4 kB.

    Args:
        layout: what goes where.
        capacity: R at most, in rows.
    """

    layout: Layout
    capacity: int
    rows: int = 0
    first_row: int = 0
    numeric_IR: np.ndarray = field(init=False)
    labels_R: np.ndarray = field(init=False)
    blocks: list[IdBlock | BagBlock] = field(init=False)
    extra: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.numeric_IR = np.empty((len(self.layout.numeric), self.capacity), np.float32)
        self.labels_R = np.empty(self.capacity, np.int8)
        self.extra = {}
        roles = {column.name: column.role for column in self.layout.columns}
        self.blocks = []
        for names in self.layout.blocks:
            if roles[names[0]] == "jagged":
                nothing = np.empty(0, np.int64)
                self.blocks.append(
                    BagBlock(np.empty(self.capacity, np.int64), np.empty(self.capacity, np.int32), nothing)
                )
            else:
                width = np.int64 if names[0] in self.layout.wide else np.int32
                self.blocks.append(IdBlock(np.empty((len(names), self.capacity), width)))

    def cut(self, start: int, stop: int) -> Rows:
        """Copy rows ``start`` to ``stop`` out of the window."""
        blocks: list[np.ndarray | tuple[np.ndarray, np.ndarray]] = []
        for block in self.blocks:
            if isinstance(block, IdBlock):
                blocks.append(block.ids_FR[:, start:stop].astype(np.int64, order="C"))
            else:
                blocks.append(_cut_bags(block, start, stop))
        return Rows(
            dense_BI=np.ascontiguousarray(self.numeric_IR[:, start:stop].T),
            labels_B=self.labels_R[start:stop].astype(np.float32),
            blocks=blocks,
            extra={name: values[start:stop].copy() for name, values in self.extra.items()},
        )


@dataclass
class Rows:
    """Rows of one batch that lie in one window; a block is (F, B) int64 ids, or (B,) int32 lengths and (L,) int64."""

    dense_BI: np.ndarray
    labels_B: np.ndarray
    blocks: list[np.ndarray | tuple[np.ndarray, np.ndarray]]
    extra: dict[str, np.ndarray]


def _cut_bags(block: BagBlock, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    lengths_B = block.lengths_R[start:stop].copy()
    ends_B = np.cumsum(lengths_B, dtype=np.int64)
    total = int(ends_B[-1]) if len(ends_B) else 0
    # Entry j of the batch, of row i, lies at starts[i] + (j - first entry of row i).
    shift_B = block.starts_R[start:stop] - (ends_B - lengths_B)
    entries_L = np.repeat(shift_B, lengths_B)
    entries_L += np.arange(total)
    return lengths_B, block.values_L[entries_L].astype(np.int64, copy=False)


def assemble(layout: Layout, pieces: Sequence[Rows]) -> Batch:
    """Join the rows of a batch (from one window mostly, from several at their borders) to a Batch."""
    rows = pieces[0] if len(pieces) == 1 else _join(pieces)
    batch_rows = len(rows.labels_B)
    dense = torch.from_numpy(rows.dense_BI)
    keys = layout.keys
    if all(isinstance(block, np.ndarray) for block in rows.blocks):
        ids = [block for block in rows.blocks if isinstance(block, np.ndarray)]
        ids_FB = ids[0] if len(ids) == 1 else np.concatenate([np.empty((0, batch_rows), np.int64), *ids])
        sparse = keyed_one_id(keys, torch.from_numpy(ids_FB))
    else:
        lengths: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for block in rows.blocks:
            if isinstance(block, np.ndarray):
                lengths.append(np.ones(block.shape, np.int32))
                values.append(block.reshape(-1))
            else:
                lengths.append(block[0][None])
                values.append(block[1])
        sparse = keyed_bags(keys, torch.from_numpy(np.concatenate(lengths)), torch.from_numpy(np.concatenate(values)))
    return Batch(dense=dense, sparse=sparse, labels=torch.from_numpy(rows.labels_B), extra=rows.extra)


def _join(pieces: Sequence[Rows]) -> Rows:
    blocks: list[np.ndarray | tuple[np.ndarray, np.ndarray]] = []
    for parts in zip(*(piece.blocks for piece in pieces), strict=True):
        ids = [part for part in parts if isinstance(part, np.ndarray)]
        bags = [part for part in parts if not isinstance(part, np.ndarray)]
        if ids:
            blocks.append(np.concatenate(ids, axis=1))
        else:
            blocks.append((np.concatenate([bag[0] for bag in bags]), np.concatenate([bag[1] for bag in bags])))
    return Rows(
        dense_BI=np.concatenate([piece.dense_BI for piece in pieces]),
        labels_B=np.concatenate([piece.labels_B for piece in pieces]),
        blocks=blocks,
        extra={name: np.concatenate([piece.extra[name] for piece in pieces]) for name in pieces[0].extra},
    )
