"""A step with a gradient to learn by: 1 above zero, else 0, differentiated by a long-tailed estimator.

Reference: the estimator of Lyu et al., "OptEmbed: Learning Optimal Embedding Table for Click-through Rate Prediction",
CIKM 2022, arXiv:2208.04482: steep around zero, so that rows at the threshold decide quickly, and with a tail, so that
rows a little further away can still come back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def long_tailed_slope(values: Tensor) -> Tensor:
    """What stands for the step's derivative: 2 - 4|z| up to |z| = 0.4, then 0.4 up to |z| = 1, then 0."""
    distance = values.abs()
    return (2 - 4 * distance).clamp_(min=0.4).masked_fill_(distance > 1, 0.0)


class LongTailedStep(torch.autograd.Function):
    """``LongTailedStep.apply(z)``: 1.0 where z > 0, else 0.0 (also at 0), any shape, float."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return (values > 0).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        return gradients[0] * long_tailed_slope(values)
