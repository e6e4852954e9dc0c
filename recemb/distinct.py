"""The distinct keys of a batch, so that what is costly is done once for each: click logs repeat their frequent ids.

Shapes: N keys (one an id of the batch), U distinct ones, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
        inverse = torch.empty_like(order)
        inverse[order] = places
        return Distinct(distinct, inverse, order, starts)

    @property
    def counts(self) -> Tensor:
        """(U,) int64 how often each distinct key came."""
        return torch.diff(self.starts, append=self.starts.new_tensor([self.order.numel()]))

    def expand(self, vectors_UD: Tensor) -> Tensor:
        """(U, D) a row for each distinct key -> (N, D) a row for each key; differentiable."""
        expanded: Tensor = _Expand.apply(vectors_UD, self.inverse, self.order, self.starts)
        return expanded


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
