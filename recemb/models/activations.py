"""Activations of the Deep Interest Network: Dice and PReLU, one learned slope a unit, and the MLP they belong to.

Reference: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv:1706.06978 (section
5.3).

Shapes: N rows (samples, or events of all histories), C units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["dice", "prelu", "relu", "sigmoid"]


class Dice(nn.Module):
    """f(s) = p(s) s + (1 - p(s)) alpha s, with p(s) = sigmoid((s - E[s]) / sqrt(Var[s] + eps)) per unit.

    A PReLU whose kink follows the distribution of its input. In training E and Var (biased) are those of the batch, and
    gradients flow through them as in batch normalisation; in evaluation they are the running ones, so that a row's
    result depends on no other row. Rows are all there is: histories come jagged, no padding enters the statistics.

    The running statistics are those of exponentially weighted *rows*, not batches: a last batch of three rows counts as
    three rows, the variance between batches is counted, and there is no bias towards the initial 0 and 1. A batch
    without rows changes nothing.

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
        if self.training:
            mean, variance = self.batch_statistics(inputs)
        else:
            mean, variance = self.running_mean, self.running_variance
        gate = torch.sigmoid((inputs - mean) * torch.rsqrt(variance + self.eps))
        return inputs * (self.alpha + (1 - self.alpha) * gate)

    def batch_statistics(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of (N, C) rows, (C,) each, taken into the running ones; 0 and 1 for no rows."""
        if inputs.shape[0] == 0:
            return torch.zeros_like(self.running_mean), torch.ones_like(self.running_variance)
        variance, mean = torch.var_mean(inputs, dim=0, correction=0)
        self.update(mean.detach(), variance.detach(), inputs.shape[0])
        return mean, variance

    @torch.no_grad()
    def update(self, mean: Tensor, variance: Tensor, num_rows: int) -> None:
        """Merge the statistics of ``num_rows`` new rows into the running ones."""
        before = self.running_rows * (1 - self.momentum)
        total = before + self.momentum * num_rows
        share = self.momentum * num_rows / total
        shift = mean.to(self.running_mean.dtype) - self.running_mean
        self.running_variance.lerp_(variance.to(self.running_variance.dtype), share)
        self.running_variance.add_(shift.square() * (share * (1 - share)))
        self.running_mean.add_(shift * share)
        self.running_rows.copy_(total)


def make_activation(activation: Activation, num_units: int) -> nn.Module:
    """A fresh activation of ``num_units`` units: Dice, PReLU (slope 0.25 a unit), ReLU or sigmoid.

    Raises:
        ValueError: another name.
    """
    if activation == "dice":
        return Dice(num_units)
    if activation == "prelu":
        return nn.PReLU(num_units)
    if activation == "relu":
        return nn.ReLU()
    if activation == "sigmoid":
        return nn.Sigmoid()
    raise ValueError(f"activation must be 'dice', 'prelu', 'relu' or 'sigmoid', got {activation!r}")


def make_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and zero biases, as the authors' code has it."""
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class ActivatedMLP(nn.Sequential):
    """Linear layers with an activation after each but the last, (N, in_features) -> (N, widths[-1]).

    Args:
        in_features: width of the input.
        widths: output width of each layer, at least one.
        activation: between the layers.

    Raises:
        ValueError: no layer, a width below 1, another activation.
    """

    def __init__(self, in_features: int, widths: Sequence[int], *, activation: Activation) -> None:
        sizes = [in_features, *widths]
        if not widths or min(sizes) < 1:
            raise ValueError(f"an MLP needs an input and at least one layer, all of width 1 or more, got {sizes}")
        layers: list[nn.Module] = []
        for size_in, size_out in zip(sizes, widths, strict=False):
            layers += [make_linear(size_in, size_out), make_activation(activation, size_out)]
        super().__init__(*layers[:-1])
