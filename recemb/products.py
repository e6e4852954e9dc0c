"""Products of looked-up rows, forward and backward in blocks that fit the processor's cache.

A batch of 4,096 samples has several megabytes of rows. Autograd's own products write each intermediate to memory and
read it back; here a block of rows goes through all of a formula at once.

Shapes: N ids, D embedding_dim, k factors or terms.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Values of one tensor in a block: 256 KiB, so that the tensors of a formula share a cache of 1 to 2 MiB.
_BLOCK_VALUES = 1 << 16


def gated_product(first_ND: Tensor, others_ND: Sequence[Tensor], gate: Tensor | None) -> Tensor:
    """``first * others[0] * others[1] * ...`` where the gate is open, else ``first``: (N, D).

    Args:
        first_ND: rows.
        others_ND: one or more tensors of the same shape; without gradient where the gate is closed.
        gate: (N, 1) float32, 1 where it is open and 0 where closed; None where all is open.
    """
    return _GatedProduct.apply(gate, first_ND, *others_ND)


def weighted_sum(terms_kND: Tensor, weights_Nk: Tensor) -> Tensor:
    """``terms[0] * weights[:, :1] + terms[1] * weights[:, 1:2] + ...``: (N, D)."""
    return _WeightedSum.apply(terms_kND, weights_Nk)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor | None, first: Tensor, *others: Tensor) -> Tensor:
        ctx.gate = gate
        ctx.save_for_backward(first, *others)
        output = torch.empty_like(first)
        for rows in _blocks(first):
            torch.mul(first[rows], _gated([other[rows] for other in others], gate, rows), out=output[rows])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, gate = gradients[0].contiguous(), ctx.gate
        first, *others = ctx.saved_tensors
        to_first, *to_others = [torch.empty_like(gradient) for _ in ctx.saved_tensors]
        for rows in _blocks(first):
            factors = [other[rows] for other in others]
            torch.mul(gradient[rows], _gated(factors, gate, rows), out=to_first[rows])
            common = gradient[rows] * first[rows]
            if gate is not None:
                common *= gate[rows]
            for index, target in enumerate(to_others):
                rest = [*factors[:index], *factors[index + 1 :]]
                target[rows] = functools.reduce(torch.mul, rest, common)
        return None, to_first, *to_others


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(terms, weights)
        output = torch.empty_like(terms[0])
        for rows in _blocks(output):
            target = output[rows]
            torch.mul(terms[0, rows], weights[rows, :1], out=target)
            for index in range(1, terms.shape[0]):
                target += terms[index, rows] * weights[rows, index : index + 1]
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gradient = gradients[0].contiguous()
        terms, weights = ctx.saved_tensors
        to_terms, to_weights = torch.empty_like(terms), torch.empty_like(weights)
        for rows in _blocks(gradient):
            for index in range(terms.shape[0]):
                torch.mul(gradient[rows], weights[rows, index : index + 1], out=to_terms[index, rows])
                torch.sum(gradient[rows] * terms[index, rows], dim=1, out=to_weights[rows, index])
        return to_terms, to_weights


def _gated(factors: Sequence[Tensor], gate: Tensor | None, rows: slice) -> Tensor:
    """The product of the factors where the gate is open, else 1."""
    product = functools.reduce(torch.mul, factors)
    if gate is None:
        return product
    # torch.where and addcmul take seven times as long as these two, for a gate that is one value a row.
    return (product * gate[rows]).add_(1 - gate[rows])


def _blocks(rows_ND: Tensor) -> Iterator[slice]:
    num_rows, width = rows_ND.shape
    size = max(num_rows if rows_ND.is_cuda else _BLOCK_VALUES // width, 1)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
