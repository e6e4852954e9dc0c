"""The sketch of CAFE (arXiv:2312.03256): which ids are hot, and which may become so.

Shapes: H hot rows = buckets of the sketch, U distinct keys of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recemb.grouped_linear import sort_by_group

_SLOTS = 4
# Scores decay once this many times threshold * buckets has been inserted.
_DECAY_AFTER = 10


class HotSketch(nn.Module):
    """Buckets of four slots (key, score, hot row or -1): which keys are hot, and which may become so.

    Args:
        num_rows: H, hot rows and buckets.
        key_dtype: int32 or int64; keys are at least 0.
        threshold: score from which a key is hot.
        decay: factor of all scores, once enough has been inserted.
    """

    def __init__(self, num_rows: int, *, key_dtype: torch.dtype, threshold: float, decay: float) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.threshold = threshold
        self.decay = decay
        self.keys: Tensor
        self.register_buffer("keys", torch.full((num_rows, _SLOTS), -1, dtype=key_dtype))
        self.scores: Tensor
        self.register_buffer("scores", torch.zeros(num_rows, _SLOTS))
        self.hot_rows: Tensor
        self.register_buffer("hot_rows", torch.full((num_rows, _SLOTS), -1, dtype=torch.int32))
        self.inserted: Tensor
        self.register_buffer("inserted", torch.zeros((), dtype=torch.float64))
        self._used = torch.zeros(0, dtype=torch.bool)
        self._used_of: tuple[int, int] | None = None

    @staticmethod
    def bytes_per_row(key_dtype: torch.dtype) -> int:
        """Bytes of one bucket, of which there is one a hot row."""
        return _SLOTS * (key_dtype.itemsize + 4 + 4)

    def find(self, keys: Tensor) -> Tensor:
        """Hot row of every int64 key, -1 for cold and unknown ones; same shape."""
        buckets = (keys % self.num_rows).view(-1)
        known = self.keys.index_select(0, buckets) == keys.to(self.keys.dtype).view(-1, 1)
        # At most one slot matches; rows count from 1 here, so that the sum is 0 where none does.
        rows = (self.hot_rows.index_select(0, buckets) + 1).mul_(known)
        # Column by column, which is several times as fast as a sum over so short a dimension.
        row = (rows[:, 0] + rows[:, 1]).add_(rows[:, 2]).add_(rows[:, 3])
        return row.to(torch.int64).sub_(1).view(keys.shape)

    def insert(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Count a batch.

        Args:
            keys: (U,) int64, distinct and ascending.
            values: (U,) float32, at least 0, added to the scores.

        Returns:
            Positions in ``keys`` of those that became hot, and their hot rows.
        """
        if float(self.inserted) > _DECAY_AFTER * self.num_rows * self.threshold:
            self._decay()
        self.inserted += values.sum()
        buckets = keys % self.num_rows
        matches = self.keys.index_select(0, buckets) == keys.to(self.keys.dtype).unsqueeze(1)
        # Column by column, several times as fast as reductions over so short a dimension; at most one slot matches.
        first, second, third, fourth = matches.unbind(1)
        known = first | second | third | fourth
        positions, unknown = known.nonzero().view(-1), (~known).nonzero().view(-1)
        slots = buckets * _SLOTS
        slots += second
        slots.add_(third, alpha=2).add_(fourth, alpha=3)
        slots = slots.index_select(0, positions)
        # Distinct slots: their order does not matter.
        self.scores.view(-1).scatter_add_(0, slots, values.index_select(0, positions))
        promoted, rows = self._promote(positions, slots)
        self._insert_unknown(*(column.index_select(0, unknown) for column in (keys, values, buckets)))
        return promoted, rows

    def _promote(self, positions: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        scores, hot_rows = self.scores.view(-1), self.hot_rows.view(-1)
        ready = (scores.index_select(0, slots) >= self.threshold) & (hot_rows.index_select(0, slots) < 0)
        chosen = ready.nonzero().view(-1)
        positions, slots = positions[chosen], slots[chosen]
        if len(slots) == 0:
            return positions, slots
        strongest = torch.sort(scores[slots], descending=True, stable=True).indices
        rows = (~self._used_rows()).nonzero().view(-1)[: len(slots)]
        chosen = strongest[: len(rows)]
        hot_rows[slots[chosen]] = rows.to(torch.int32)
        self._used[rows] = True
        self._used_of = (id(self.hot_rows), self.hot_rows._version)
        return positions[chosen], rows

    def _insert_unknown(self, keys: Tensor, values: Tensor, buckets: Tensor) -> None:
        if len(keys) == 0:
            return
        order = torch.sort(values, descending=True, stable=True).indices
        order = order[sort_by_group(buckets[order])]
        keys, values, buckets = keys[order].to(self.keys.dtype), values[order], buckets[order]
        _, group, counts = torch.unique_consecutive(buckets, return_inverse=True, return_counts=True)
        rank = torch.arange(len(keys), device=keys.device) - (counts.cumsum(0) - counts)[group]
        # Slots fill from the first to the last, and are never emptied.
        slot = (self.keys[buckets] >= 0).sum(dim=1) + rank
        fits = slot < _SLOTS
        self.keys[buckets[fits], slot[fits]] = keys[fits]
        self.scores[buckets[fits], slot[fits]] = values[fits]
        keys, values, buckets = keys[~fits], values[~fits], buckets[~fits]
        if len(keys) == 0:
            return
        full, counts = torch.unique_consecutive(buckets, return_counts=True)
        strongest = keys[counts.cumsum(0) - counts]
        total = torch.segment_reduce(values, "sum", lengths=counts)
        cold = torch.where(self.hot_rows[full] < 0, self.scores[full], torch.inf)
        lowest, victim = cold.min(dim=1)
        open_ = lowest < torch.inf
        full, victim = full[open_], victim[open_]
        self.keys[full, victim] = strongest[open_]
        self.scores[full, victim] += total[open_]

    def _decay(self) -> None:
        self.scores *= self.decay
        self.hot_rows.masked_fill_(self.scores < self.threshold, -1)
        self.inserted.zero_()

    def _used_rows(self) -> Tensor:
        """(H,) which hot rows are taken; follows from ``hot_rows``, and is kept until somebody else writes those."""
        if self._used_of != (id(self.hot_rows), self.hot_rows._version):
            self._used = torch.zeros(self.num_rows, dtype=torch.bool, device=self.hot_rows.device)
            self._used[self.hot_rows[self.hot_rows >= 0].to(torch.int64)] = True
        return self._used
