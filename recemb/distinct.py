"""The distinct keys of a batch, so that what is costly is done once for each: click logs repeat their frequent ids.

Shapes: N keys (one an id of the batch), U distinct ones, D width, F features, T tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recemb.bags import Bags
from recemb.hashing import mix

# Bits that are left for a key where 2**20 ids and more come in a batch.
_KEY_BITS = 42


@dataclass(frozen=True)
class Distinct:
    """Where the N keys of a batch are among its U distinct ones.

    Args:
        keys: (U,) int64, ascending.
        inverse: (N,) int64 in [0, U): which distinct key each key is.
        order: (N,) int64 positions of the keys, those of the first distinct key first.
        starts: (U,) int64 where in ``order`` each distinct key begins.
    """

    keys: Tensor
    inverse: Tensor
    order: Tensor
    starts: Tensor

    @staticmethod
    def of(keys: Tensor, num_keys: int, *, merge: bool = True) -> Distinct:
        """Find the distinct ones.

        Args:
            keys: (N,) int64 in [0, num_keys).
            num_keys: bound of the keys; on CPU the fast way needs ``num_keys * N`` below 2**62 or so.
            merge: False only sorts and takes all keys for distinct, which shows what merging them saves.
        """
        position_bits = keys.numel().bit_length()
        if keys.device.type == "cpu" and num_keys.bit_length() + position_bits < 64:
            # Key and position packed into one integer: numpy's vectorised sort takes a quarter of torch's time.
            packed = (keys << position_bits) | torch.arange(keys.numel())
            packed.numpy().sort()
            order = packed & ((1 << position_bits) - 1)
            in_order = packed >> position_bits
        else:
            in_order, order = torch.sort(keys, stable=True)
        places = torch.arange(keys.numel(), device=keys.device)
        distinct, starts = in_order, places
        if merge:
            distinct, places, counts = torch.unique_consecutive(in_order, return_inverse=True, return_counts=True)
            starts = counts.cumsum(0) - counts
        # Half the time of an assignment by index.
        inverse = torch.empty_like(order).scatter_(0, order, places)
        return Distinct(distinct, inverse, order, starts)

    @property
    def counts(self) -> Tensor:
        """(U,) int64 how often each distinct key came."""
        return torch.diff(self.starts, append=self.starts.new_tensor([self.order.numel()]))

    def expand(self, vectors_UD: Tensor) -> Tensor:
        """(U, D) a row for each distinct key -> (N, D) a row for each key; differentiable."""
        expanded: Tensor = _Expand.apply(vectors_UD, self.inverse, self.order, self.starts)
        return expanded


class DistinctIds(nn.Module):
    """Merges the ids of a batch that one table gets more than once.

    Args:
        num_embeddings: ids of each table, below 2**63.
        owners: the table of each feature; all tables in ascending order.
    """

    def __init__(self, num_embeddings: Sequence[int], owners: Sequence[int]) -> None:
        super().__init__()
        bounds = [0, *itertools.accumulate(num_embeddings)]
        # Keys count the ids through all tables. Where that takes too many bits they are hashes behind the table's
        # number, and then compared with their ids.
        self._hashes = bounds[-1].bit_length() > _KEY_BITS
        if self._hashes:
            self._hash_bits = _KEY_BITS - len(num_embeddings).bit_length()
            bounds = [table << self._hash_bits for table in range(len(num_embeddings) + 1)]
        self._num_keys = bounds[-1]
        self._bounds: Tensor
        self.register_buffer("_bounds", torch.tensor(bounds), persistent=False)
        self._starts: Tensor
        self.register_buffer("_starts", torch.tensor([bounds[owner] for owner in owners]), persistent=False)
        self._first_features: Tensor
        first_features = [owners.index(table) for table in range(len(num_embeddings))]
        self.register_buffer("_first_features", torch.tensor(first_features), persistent=False)

    def merge(self, bags: Bags) -> tuple[Distinct, Bags] | None:
        """Where each id is among the distinct ones, and those: one bag a table, under the table's first feature.

        None where the ids had better stay as they are: on devices where merging was not measured, and where two hashes
        collide, once in some ten thousand batches of unbounded ids.
        """
        if bags.ids.device.type != "cpu":
            return None
        starts = bags.per_id(self._starts)
        keys = bags.ids
        if self._hashes:
            keys = mix(keys, starts).bitwise_and_((1 << self._hash_bits) - 1)
        distinct = Distinct.of((keys + starts).view(-1), self._num_keys)
        counts = torch.searchsorted(distinct.keys, self._bounds).diff()
        if self._hashes:
            ids = bags.ids.reshape(-1)
            merged = ids.index_select(0, distinct.order.index_select(0, distinct.starts))
            if not torch.equal(merged.index_select(0, distinct.inverse), ids):
                return None
        else:
            merged = distinct.keys - torch.repeat_interleave(self._bounds[:-1], counts)
        lengths = torch.zeros_like(self._starts).index_copy_(0, self._first_features, counts)
        return distinct, Bags(merged, lengths.unsqueeze(1), single=False)


class _Expand(torch.autograd.Function):
    """index_select, whose gradient is summed in the order of the rows: several times as fast as index_add on CPU."""

    @staticmethod
    def forward(ctx: Any, vectors_UD: Tensor, inverse: Tensor, order: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(order, starts)
        return vectors_UD.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        [gradient_ND] = gradients
        order, starts = ctx.saved_tensors
        if order.numel() == 0:
            return gradient_ND, None, None, None
        # The gradients serve as a table, and a bag is the occurrences of one key.
        return torch.embedding_bag(gradient_ND.contiguous(), order, starts, mode=0)[0], None, None, None
