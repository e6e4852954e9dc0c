"""Activations of the Deep Interest Network by name, and the MLP they belong to.

Reference: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv:1706.06978 (section
5.3).

Shapes: N rows (samples, or events of all histories).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from recemb.models.dice import Dice

Activation = Literal["dice", "prelu", "relu", "sigmoid"]


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
