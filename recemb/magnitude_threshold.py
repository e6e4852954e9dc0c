"""The k-th smallest magnitude of very many numbers, without sorting them, over ranks that hold a part each.

The bit patterns of float32 numbers from 0 on are in the order of the numbers, so two counts, of 2**15 and 2**16 bins,
find the exact one in two passes and a few hundred kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_LOW_BITS = 16
_HIGH_BINS = 1 << 15
# Of a pass: the int32 copy of a piece stays in the caches.
_AT_ONCE = 1 << 18


@torch.no_grad()
def kth_magnitude(pieces: Sequence[Tensor], k: int, *, over_ranks: bool = False) -> float:
    """The k-th smallest absolute value (1 is the smallest), exactly.

    Args:
        pieces: float32, of any shapes; contiguous ones are not copied whole.
        k: at least 1, at most the number of all values.
        over_ranks: the pieces of all ranks make the set; every rank calls this, and gets the same.

    Raises:
        ValueError: k out of range, NaN among the values.
    """
    high = _count(pieces, None, _HIGH_BINS, over_ranks)
    total = int(high.sum())
    if not 1 <= k <= total:
        raise ValueError(f"k must be in [1, {total}], got {k}")
    below = high.cumsum(0)
    prefix = int(torch.searchsorted(below, torch.tensor(k)))
    rest = k - (int(below[prefix - 1]) if prefix else 0)
    low = _count(pieces, prefix, 1 << _LOW_BITS, over_ranks)
    suffix = int(torch.searchsorted(low.cumsum(0), torch.tensor(rest)))
    bits = torch.tensor(prefix << _LOW_BITS | suffix, dtype=torch.int32)
    value = float(bits.view(torch.float32))
    if value != value:
        raise ValueError("values must be numbers, got NaN among the smallest ones")
    return value


def _count(pieces: Sequence[Tensor], prefix: int | None, num_bins: int, over_ranks: bool) -> Tensor:
    """Values by the upper half of their pattern, or by the lower half of those with this upper one; on the CPU."""
    counts: Tensor | None = None
    for piece in pieces:
        for part in piece.detach().reshape(-1).split(_AT_ONCE):
            bits = part.abs().view(torch.int32)
            high = bits >> _LOW_BITS
            found = high if prefix is None else bits[high == prefix] & ((1 << _LOW_BITS) - 1)
            added = torch.bincount(found, minlength=num_bins)
            counts = added if counts is None else counts.add_(added)
    if counts is None:
        counts = torch.zeros(num_bins, dtype=torch.int64)
    if over_ranks:
        if dist.get_backend() != "gloo":
            counts = counts.cuda()
        dist.all_reduce(counts)
    return counts.cpu()
