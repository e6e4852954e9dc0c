"""Row-wise Adagrad on CPU in torch operations, for processors on which fbgemm's kernel is slow.

fbgemm 1.8 generates its CPU row-wise Adagrad with scalar SSE instructions between AVX ones. On Intel processors each
such switch stalls, about 0.4 microseconds in all for every distinct row of a batch, several times what the rest of the
step needs; on AMD the same code is fast. ``experiments/speed/kernels.py`` measures both.

Shapes: R rows of all tables, D embedding_dim, N ids in the batch, U distinct rows among them, B batch, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class RowwiseAdagrad:
    """The update ``a[r] += mean(g[r]**2); w[r] -= lr * g[r] / (sqrt(a[r]) + eps)``, g[r] summed over the batch.

    Occurrences of a row are brought together by sorting (row, position) packed into one integer: numpy's vectorised
    sort of it takes a quarter of the time of a torch.sort with indices, and the sums come out the same on every run and
    for any number of threads.

    Args:
        rows: (R, D) float32 view of the tables, updated in place.
        accumulators: (R,) float32 view, updated in place.
        eps: added to the root.
    """

    def __init__(self, rows: Tensor, accumulators: Tensor, eps: float) -> None:
        self._rows = rows
        self._accumulators = accumulators
        self._eps = eps
        self._row_bits = rows.shape[0].bit_length()

    @torch.no_grad()
    def update(self, ids: Tensor, gradients_ND: Tensor, learning_rate: float) -> None:
        """Apply the gradients of one batch.

        Args:
            ids: (N,) int64 rows, repeats allowed.
            gradients_ND: (N, D) float32 gradient of each occurrence.
            learning_rate: lr.
        """
        if ids.numel() == 0:
            return
        rows, order, starts = self._distinct(ids)
        # The gradients serve as a table, and a bag is the occurrences of one row: three times as fast as scatter_add.
        sums = torch.embedding_bag(gradients_ND, order, starts, mode=0)[0]
        accumulators = self._accumulators.index_select(0, rows)
        norms = torch.linalg.vector_norm(sums, dim=1)
        accumulators.addcmul_(norms, norms, value=1 / sums.shape[1])
        self._accumulators.scatter_(0, rows, accumulators)
        sums *= accumulators.sqrt_().add_(self._eps).reciprocal_().mul_(-learning_rate).unsqueeze(1)
        self._rows.scatter_add_(0, rows.unsqueeze(1).expand_as(sums), sums)

    def _distinct(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(U,) distinct rows in ascending order, (N,) occurrences row after row, (U,) where each row's start."""
        position_bits = ids.numel().bit_length()
        assert self._row_bits + position_bits < 64, "row and position must fit one int64"
        key = (ids << position_bits) | torch.arange(ids.numel())
        key.numpy().sort()
        rows, counts = torch.unique_consecutive(key >> position_bits, return_counts=True)
        starts = torch.zeros_like(counts)
        torch.cumsum(counts[:-1], dim=0, out=starts[1:])
        return rows, key & ((1 << position_bits) - 1), starts


class UpdatingLookup(torch.autograd.Function):
    """A lookup whose backward updates the rows and passes no gradient on, as fbgemm's fused kernels do."""

    @staticmethod
    def forward(
        ctx: Any,
        trigger: Tensor,
        lookup: Callable[[], Tensor],
        update: Callable[[Tensor], None],
    ) -> Tensor:
        """``lookup()``, with ``update(gradient)`` in backward.

        Args:
            trigger: any tensor that requires a gradient, so that autograd calls backward at all.
            lookup: returns the output.
            update: takes the gradient of the output.
        """
        ctx.update = update
        return lookup()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.update(gradients[0])
        return None, None, None


def occurrence_gradients(
    gradient: Tensor, ids_FN: Tensor, offsets: Tensor, num_features: int, mean: bool, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradient of pooled outputs -> rows and the gradient of each occurrence of a row.

    Args:
        gradient: (B, F * D) float32.
        ids_FN: (N,) int64 rows, feature after feature.
        offsets: (F * B + 1,) int64 start of each bag.
        num_features: F.
        mean: bags were averaged.
        weights: (N,) float32 weight of each id, or None.

    Returns:
        (N,) rows and (N, D) gradients, both in an order of their own.
    """
    batch_size = gradient.shape[0]
    width = gradient.shape[1] // num_features
    lengths = offsets.diff()
    if weights is None and ids_FN.numel() == lengths.numel() and bool((lengths == 1).all()):
        # The gradient already lies sample after sample; turning the ids is 8 times cheaper than turning it.
        return ids_FN.view(num_features, batch_size).t().reshape(-1), gradient.reshape(-1, width)
    per_bag = gradient.view(batch_size, num_features, width).permute(1, 0, 2).reshape(-1, width)
    if mean:
        per_bag = per_bag / lengths.clamp(min=1).unsqueeze(1)
    bags = torch.repeat_interleave(lengths, output_size=ids_FN.numel())
    gradients = per_bag.index_select(0, bags)
    return ids_FN, gradients if weights is None else gradients * weights.unsqueeze(1)


@functools.cache
def fbgemm_stalls() -> bool:
    """Whether fbgemm's row-wise Adagrad stalls on this processor: Intel's do.

    A rule, not a timing, so that the same machine always rounds the same way and a resumed run repeats itself.
    """
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
