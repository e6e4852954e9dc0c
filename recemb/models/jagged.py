"""Operations on jagged rows: values of all samples one after the other, cut by offsets. Nothing is padded.

Both directions of both operations are one pass over the N values; autograd's own would scatter row by row.

Shapes: B samples, N entries of all samples, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def segments_of(offsets: Tensor, num_entries: int) -> Tensor:
    """(B + 1,) int64 offsets -> (N,) int64 number of the sample that owns each entry."""
    return torch.repeat_interleave(offsets.diff(), output_size=num_entries)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_BD: Tensor, segments: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        return values_BD.index_select(0, segments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return sum_of_segments(gradient_ND, offsets), None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_ND: Tensor, weights_N: Tensor, segments: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(values_ND, weights_N, segments)
        return sum_of_segments(values_ND, offsets, weights_N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_BD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values_ND, weights_N, segments = ctx.saved_tensors
        gradient_ND = gradient_BD.index_select(0, segments)
        # A batched product of (1, D) and (D, 1): no (N, D) temporary.
        weights_gradient = torch.bmm(gradient_ND.unsqueeze(1), values_ND.unsqueeze(2)).view(-1)
        return gradient_ND.mul_(weights_N.unsqueeze(1)), weights_gradient, None, None


def spread(values_BD: Tensor, segments: Tensor, offsets: Tensor) -> Tensor:
    """The row of the owning sample for each entry: (B, D) -> (N, D); its gradient is summed by sample.

    Args:
        values_BD: one row a sample.
        segments: (N,) from ``segments_of``.
        offsets: (B + 1,) int64.
    """
    result: Tensor = _Spread.apply(values_BD, segments, offsets)
    return result


def weighted_sum(values_ND: Tensor, weights_N: Tensor, segments: Tensor, offsets: Tensor) -> Tensor:
    """Sum of weight times row over the entries of each sample: (N, D) -> (B, D); zeros for samples without entries.

    Args:
        values_ND: rows.
        weights_N: (N,) of the same dtype.
        segments: (N,) from ``segments_of``.
        offsets: (B + 1,) int64.
    """
    result: Tensor = _WeightedSum.apply(values_ND, weights_N, segments, offsets)
    return result


def segment_sum(values_ND: Tensor, segments: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the rows of each sample: (N, D) -> (B, D); zeros for samples without entries."""
    result: Tensor = _Sum.apply(values_ND, segments, offsets)
    return result


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_ND: Tensor, segments: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(segments)
        return sum_of_segments(values_ND, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_BD: Tensor) -> tuple[Tensor, None, None]:
        (segments,) = ctx.saved_tensors
        return gradient_BD.index_select(0, segments), None, None


def segment_softmax(scores_N: Tensor, segments: Tensor, offsets: Tensor) -> Tensor:
    """Softmax among the entries of each sample: (N,) -> (N,), positive, summing to 1 in every sample with entries."""
    num_samples = offsets.numel() - 1
    # Shifted by each sample's largest score, so that exp cannot overflow; a constant shift has no gradient.
    largest = scores_N.new_full((num_samples,), -torch.inf)
    largest = largest.scatter_reduce(0, segments, scores_N.detach(), "amax")
    powers = (scores_N - largest.index_select(0, segments)).exp()
    totals = segment_sum(powers.unsqueeze(1), segments, offsets)
    return powers / spread(totals, segments, offsets).squeeze(1)


def sum_of_segments(values_ND: Tensor, offsets: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Sums of (N, D) rows by sample, each times its weight where given, for use inside functions: without gradient."""
    num_entries = values_ND.shape[0]
    if num_entries == 0:
        return values_ND.new_zeros(offsets.numel() - 1, values_ND.shape[1])
    # The values serve as an embedding table read once from top to bottom.
    rows = torch.arange(num_entries, device=values_ND.device)
    values_ND = values_ND.contiguous()
    sums: Tensor = torch.embedding_bag(
        values_ND, rows, offsets, mode=0, per_sample_weights=weights_N, include_last_offset=True
    )[0]
    return sums
