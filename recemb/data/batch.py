"""A batch of training rows as a model takes it, and the way sparse features become a KeyedJaggedTensor.

Shapes: B rows of the batch, I numeric features, F categorical features, L ids of all bags of the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class Batch:
    """Rows of a click log.

    Args:
        dense: (B, I) float32, contiguous; (B, 0) where there are no numeric features.
        sparse: keys in the manifest's order, ``values`` (L,) int64 feature after feature, ``lengths`` (F * B,) int32
            and ``offsets`` (F * B + 1,) int64. Where every feature has one id a row, lengths and offsets are shared
            between batches: do not write to them.
        labels: (B,) float32, 0 or 1.
        extra: further columns by name, each (B,) numpy (strings as objects); they stay on the CPU.
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    labels: Tensor
    extra: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        """B, in rows."""
        return len(self.labels)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on ``device``; itself where they already are."""
        target = torch.device(device)
        if self.labels.device == target:
            return self
        return Batch(
            dense=self.dense.to(target, non_blocking=non_blocking),
            sparse=self.sparse.to(target, non_blocking=non_blocking),
            labels=self.labels.to(target, non_blocking=non_blocking),
            extra=self.extra,
        )


# Two sizes (full batches and the last one) on two splits; more would keep megabytes of layouts nobody uses.
@functools.lru_cache(maxsize=8)
def _one_id_layout(num_features: int, batch_rows: int) -> tuple[Tensor, Tensor]:
    bags = num_features * batch_rows
    return torch.ones(bags, dtype=torch.int32), torch.arange(bags + 1, dtype=torch.int64)


def keyed_one_id(keys: Sequence[str], ids_FB: Tensor) -> KeyedJaggedTensor:
    """One id per feature and row as a KeyedJaggedTensor, without a copy and without computing offsets.

    Args:
        keys: F feature names.
        ids_FB: (F, B) int64, contiguous; its memory becomes the values.
    """
    num_features, batch_rows = ids_FB.shape
    lengths, offsets = _one_id_layout(num_features, batch_rows)
    return KeyedJaggedTensor(
        keys=list(keys),
        values=ids_FB.view(-1),
        lengths=lengths,
        offsets=offsets,
        stride=batch_rows,
        length_per_key=[batch_rows] * num_features,
        offset_per_key=[position * batch_rows for position in range(num_features + 1)],
    )


def keyed_bags(keys: Sequence[str], lengths_FB: Tensor, values_L: Tensor) -> KeyedJaggedTensor:
    """Bags of any number of ids as a KeyedJaggedTensor whose per-key sums are computed here, once.

    Args:
        keys: F feature names.
        lengths_FB: (F, B) int32, contiguous.
        values_L: (L,) int64, feature after feature, row after row.
    """
    offsets = torch.zeros(lengths_FB.numel() + 1, dtype=torch.int64)
    torch.cumsum(lengths_FB.view(-1), 0, out=offsets[1:])
    length_per_key = lengths_FB.sum(1, dtype=torch.int64).tolist()
    offset_per_key = [0]
    for length in length_per_key:
        offset_per_key.append(offset_per_key[-1] + length)
    return KeyedJaggedTensor(
        keys=list(keys),
        values=values_L,
        lengths=lengths_FB.view(-1),
        offsets=offsets,
        stride=lengths_FB.shape[1],
        length_per_key=length_per_key,
        offset_per_key=offset_per_key,
    )
