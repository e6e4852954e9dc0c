"""The part of a linear layer over pairs (target, event) that differs from event to event.

Shapes: B samples, N events of all samples, D width of targets and events, H units of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recemb.models.jagged import spread, sum_of_segments


class _PairProducts(torch.autograd.Function):
    """See ``pair_products``. By hand, because autograd copies an (N, H) and two (N, D) arrays more than are needed."""

    @staticmethod
    def forward(
        ctx: Any,
        once_BH: Tensor,
        targets_BD: Tensor,
        events_ND: Tensor,
        of_event: Tensor,
        of_product: Tensor,
        segments: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        products = targets_BD.index_select(0, segments).mul_(events_ND)
        ctx.save_for_backward(targets_BD, events_ND, of_event, of_product, segments, offsets, products)
        hidden = once_BH.index_select(0, segments)
        return hidden.addmm_(events_ND, of_event.t()).addmm_(products, of_product.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_NH: Tensor) -> tuple[Tensor | None, ...]:
        targets_BD, events_ND, of_event, of_product, segments, offsets, products = ctx.saved_tensors
        gradient_NH = gradient_NH.contiguous()
        for_products = gradient_NH @ of_product
        for_events = (gradient_NH @ of_event).addcmul_(for_products, targets_BD.index_select(0, segments))
        return (
            sum_of_segments(gradient_NH, offsets),
            sum_of_segments(for_products.mul_(events_ND), offsets),
            for_events,
            gradient_NH.t() @ events_ND,
            gradient_NH.t() @ products,
            None,
            None,
        )


class _EqualPairProducts(torch.autograd.Function):
    """See ``pair_products``, for L events of every sample.

    ``of_event k + of_product (q * k)`` is ``(of_event + of_product diag(q)) k``: with a matrix of its own for every
    sample there is one product with its events instead of two, and q * k is never written. Backward too, where all
    gradients but that of the events are sums over the samples' (H, D) matrices ``gradient^T events``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        once_BH: Tensor,
        targets_BD: Tensor,
        events_ND: Tensor,
        of_event: Tensor,
        of_product: Tensor,
    ) -> Tensor:
        num_samples, width = targets_BD.shape
        events_BLD = events_ND.view(num_samples, -1, width)
        weights_BHD = torch.addcmul(of_event, of_product, targets_BD.unsqueeze(1))
        ctx.save_for_backward(targets_BD, events_BLD, of_product, weights_BHD)
        hidden_BLH = once_BH.unsqueeze(1).repeat(1, events_BLD.shape[1], 1)
        return hidden_BLH.baddbmm_(events_BLD, weights_BHD.transpose(1, 2)).flatten(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_NH: Tensor) -> tuple[Tensor | None, ...]:
        targets_BD, events_BLD, of_product, weights_BHD = ctx.saved_tensors
        gradient_BLH = gradient_NH.reshape(*events_BLD.shape[:2], -1)
        of_weights_BHD = torch.bmm(gradient_BLH.transpose(1, 2), events_BLD)
        return (
            gradient_BLH.sum(1),
            (of_weights_BHD * of_product).sum(1),
            torch.bmm(gradient_BLH, weights_BHD).flatten(0, 1),
            of_weights_BHD.sum(0),
            of_weights_BHD.mul_(targets_BD.unsqueeze(1)).sum(0),
        )


def pair_products(
    once_BH: Tensor,
    targets_BD: Tensor,
    events_ND: Tensor,
    of_event: Tensor,
    of_product: Tensor,
    segments: Tensor,
    offsets: Tensor,
) -> Tensor:
    """``once + of_event k + of_product (q * k)`` for every event k and the target q of its sample: (N, H).

    Args:
        once_BH: what a sample contributes to each of its events.
        targets_BD: q, one a sample.
        events_ND: k, sample after sample.
        of_event, of_product: (H, D) weights.
        segments: (N,) sample of each event, from ``segments_of``.
        offsets: (B + 1,) int64 first event of each sample.
    """
    if torch.is_autocast_enabled(events_ND.device.type):
        # Autocast does not see into functions; torch's own operations take its dtype.
        products = spread(targets_BD, segments, offsets) * events_ND
        hidden = spread(once_BH, segments, offsets) + torch.nn.functional.linear(events_ND, of_event)
        return hidden + torch.nn.functional.linear(products, of_product)
    result: Tensor
    if _equal_and_long(offsets, events_ND.shape[0], num_units=once_BH.shape[1]):
        result = _EqualPairProducts.apply(once_BH, targets_BD, events_ND, of_event, of_product)
        return result
    result = _PairProducts.apply(once_BH, targets_BD, events_ND, of_event, of_product, segments, offsets)
    return result


def _equal_and_long(offsets: Tensor, num_entries: int, *, num_units: int) -> bool:
    """Whether all samples have equally many events, and enough for matrices of their own to pay: H or more, on CPU."""
    num_samples = offsets.numel() - 1
    if offsets.is_cuda or num_samples == 0 or num_entries < num_samples * num_units:
        return False
    lengths = offsets.diff()
    return bool((lengths == lengths[0]).all())
