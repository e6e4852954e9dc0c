"""Dice, the activation of the Deep Interest Network that follows the distribution of its input.

Reference: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv:1706.06978 (section
5.3).

Shapes: N rows (samples, or events of all histories), C units.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recemb.ranks import differentiable_sum


class Dice(nn.Module):
    """f(s) = p(s) s + (1 - p(s)) alpha s, with p(s) = sigmoid((s - E[s]) / sqrt(Var[s] + eps)) per unit.

    A PReLU whose kink follows the distribution of its input. In training E and Var (biased) are those of the batch, and
    gradients flow through them as in batch normalisation; in evaluation they are the running ones, so that a row's
    result depends on no other row. Rows are all there is: histories come jagged, no padding enters the statistics.

    The running statistics are those of exponentially weighted *rows*, not batches: a last batch of three rows counts as
    three rows, the variance between batches is counted, and there is no bias towards the initial 0 and 1. A batch
    without rows changes nothing.

    Over several ranks E and Var of a training step are those of this rank's rows, as in DistributedDataParallel without
    synchronised batch normalisation; the running statistics are those of the rows of all ranks, and are the same on
    every rank. So all ranks must call it equally often in training, also without rows.

    Args:
        num_units: C.
        momentum: weight of a new batch against all before, in (0, 1]. 0.01 looks back on about a hundred batches: lower
            it for noisy small batches, raise it where training takes fewer steps than that.
        eps: added to the variance.

    Raises:
        ValueError: an argument out of range.

    Differs from the paper: alpha starts at 0 as in the authors' code, which never updates its running statistics.
    """

    running_mean: Tensor
    running_variance: Tensor
    running_rows: Tensor

    def __init__(self, num_units: int, *, momentum: float = 0.01, eps: float = 1e-8) -> None:
        super().__init__()
        if num_units < 1:
            raise ValueError(f"num_units must be at least 1, got {num_units}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.momentum = momentum
        self.eps = eps
        self.alpha = nn.Parameter(torch.zeros(num_units))
        self.register_buffer("running_mean", torch.zeros(num_units))
        self.register_buffer("running_variance", torch.ones(num_units))
        # Weighted rows seen so far, the denominator of both.
        self.register_buffer("running_rows", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, C) -> (N, C); N may be 0 or 1, also in training."""
        if not self.training:
            return self._activate(inputs)
        if inputs.shape[0] == 0:
            # Other ranks may have rows.
            self.update(self.running_mean, self.running_variance, 0)
            return self._activate(inputs)
        # Under autocast the layer before gives bfloat16, whose eight bits are too few for statistics.
        output, mean, variance = _TrainingDice.apply(inputs.to(self.alpha.dtype), self.alpha, self.eps)
        self.update(mean.detach(), variance.detach(), inputs.shape[0])
        return output.to(inputs.dtype)

    def _activate(self, inputs: Tensor) -> Tensor:
        gate = torch.sigmoid((inputs - self.running_mean) * torch.rsqrt(self.running_variance + self.eps))
        return inputs * (self.alpha + (1 - self.alpha) * gate)

    @torch.no_grad()
    def update(self, mean: Tensor, variance: Tensor, num_rows: int) -> None:
        """Merge the statistics of ``num_rows`` new rows into the running ones, over ranks those of all of them.

        Args:
            mean: (C,); of no rows anything finite.
            variance: (C,) biased; likewise.
            num_rows: of this rank.
        """
        if dist.is_initialized():
            mean, variance, num_rows = _of_all_ranks(mean, variance, num_rows)
        if num_rows == 0:
            return
        before = self.running_rows * (1 - self.momentum)
        total = before + self.momentum * num_rows
        share = self.momentum * num_rows / total
        shift = mean.to(self.running_mean.dtype) - self.running_mean
        self.running_variance.lerp_(variance.to(self.running_variance.dtype), share)
        self.running_variance.add_(shift.square() * (share * (1 - share)))
        self.running_mean.add_(shift * share)
        self.running_rows.copy_(total)


# The number is read from the device, which no compiled graph holds.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _of_all_ranks(mean: Tensor, variance: Tensor, num_rows: int) -> tuple[Tensor, Tensor, int]:
    """Mean (C,) and variance (C,), float64, of the rows of all ranks, and their number; NaN where there are none."""
    mean = mean.double()
    squares = variance.double() + mean.square()
    sums = differentiable_sum(torch.cat([mean.new_full((1,), num_rows), num_rows * mean, num_rows * squares]))
    mean, squares = (sums[1:] / sums[0]).chunk(2)
    return mean, (squares - mean.square()).clamp_(min=0), int(sums[0])


class _TrainingDice(torch.autograd.Function):
    """Dice with the statistics of its rows, 4 times as fast as autograd's on CPU.

    On (N, C) arrays of a few dozen units torch broadcasts (C,) constants at a tenth of the memory's speed; the batch
    normalisation kernels do not, in evaluation mode for a plain ``c1 * x + c2`` too.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, alpha: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        inputs = inputs.contiguous()
        normalised, mean, scale = torch.native_batch_norm(inputs, None, None, None, None, True, 0.0, eps)
        gates = normalised.sigmoid_()
        outputs = _scale_and_shift(gates, 1 - alpha, alpha).mul_(inputs)
        ctx.save_for_backward(inputs, gates, alpha, mean, scale)
        ctx.eps = eps
        variance = (scale.pow(-2) - eps).clamp_(min=0)
        ctx.mark_non_differentiable(mean, variance)
        return outputs, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        inputs, gates, alpha, mean, scale = ctx.saved_tensors
        products = gradient * inputs
        # g s (1 - p)
        closed = torch.addcmul(products, products, gates, value=-1, out=products)
        of_alpha = torch.mv(closed.t(), closed.new_ones(closed.shape[0]))
        # Through the gate, its mean and variance included.
        rest = 1 - alpha
        through_gate, *_ = torch.ops.aten.native_batch_norm_backward(
            closed.mul_(gates), inputs, rest, None, None, mean, scale, True, ctx.eps, [True, False, False]
        )
        return through_gate.addcmul_(gradient, _scale_and_shift(gates, rest, alpha)), of_alpha, None


def _scale_and_shift(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(N, C) values times (C,) ``scale`` plus (C,) ``shift``."""
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    result: Tensor = torch.native_batch_norm(values, scale, shift, zeros, ones, False, 0.0, 0.0)[0]
    return result
