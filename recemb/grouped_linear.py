"""Linear layers of which every row of the input takes one, for rows sorted by layer.

One product per layer on a contiguous block of rows. Gathering each row's own matrix instead would move I * O values a
row, and multiplying all rows by all layers would do G times the work.

Shapes: N rows, G layers, I and O widths of their input and output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def grouped_linear(inputs_NI: Tensor, weights_GIO: Tensor, biases_GO: Tensor | None, counts: Sequence[int]) -> Tensor:
    """``inputs @ weights[g] + biases[g]`` for the g of each row: (N, O).

    Args:
        inputs_NI: rows of layer 0 first, then those of layer 1, and so on.
        weights_GIO, biases_GO: the layers; biases may be None.
        counts: rows of each layer, N in all.
    """
    assert sum(counts) == inputs_NI.shape[0] and len(counts) == weights_GIO.shape[0], "counts must share out the rows"
    return _GroupedLinear.apply(inputs_NI, weights_GIO, biases_GO, counts)


class _GroupedLinear(torch.autograd.Function):
    # One node for all layers: autograd's own bookkeeping for each would cost more than the products.

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weights: Tensor, biases: Tensor | None, counts: Sequence[int]) -> Tensor:
        ctx.save_for_backward(inputs, weights)
        ctx.counts, ctx.has_biases = counts, biases is not None
        outputs = inputs.new_empty(inputs.shape[0], weights.shape[2])
        for group, rows in _blocks(counts):
            if biases is None:
                torch.mm(inputs[rows], weights[group], out=outputs[rows])
            else:
                torch.addmm(biases[group], inputs[rows], weights[group], out=outputs[rows])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        inputs, weights = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        to_inputs = torch.empty_like(inputs)
        to_weights = torch.zeros_like(weights)
        to_biases = weights.new_zeros(weights.shape[0], weights.shape[2]) if ctx.has_biases else None
        for group, rows in _blocks(ctx.counts):
            torch.mm(gradient[rows], weights[group].t(), out=to_inputs[rows])
            torch.mm(inputs[rows].t(), gradient[rows], out=to_weights[group])
            if to_biases is not None:
                torch.sum(gradient[rows], dim=0, out=to_biases[group])
        return to_inputs, to_weights, to_biases, None


def _blocks(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Layers that have rows, with where they are."""
    start = 0
    for group, count in enumerate(counts):
        if count:
            yield group, slice(start, start + count)
        start += count


def sort_by_group(groups: Tensor) -> Tensor:
    """(N,) int64 groups below 2**31 -> (N,) positions, group after group and in order within each.

    On CPU numpy's vectorised sort of (group, position) packed into one integer takes a quarter of torch's.
    """
    if groups.is_cuda:
        return torch.argsort(groups, stable=True)
    position_bits = groups.numel().bit_length()
    packed = (groups << position_bits) | torch.arange(groups.numel())
    packed.numpy().sort()
    return packed & ((1 << position_bits) - 1)
