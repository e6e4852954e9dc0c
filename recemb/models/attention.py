"""DIN's local activation unit: how much each event of a history matters for one target.

Reference: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv:1706.06978 (section
4.3).

Shapes: B samples, N events of all histories, D width of an event (all its vectors side by side), H hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from recemb.models.activations import ActivatedMLP, Activation
from recemb.models.jagged import segment_softmax, segments_of, weighted_sum
from recemb.models.pairs import pair_products


class ActivationUnit(nn.Module):
    """Weights of the events of a history, and their weighted sum.

    The weight of event k for target q is an MLP of [q, k, q - k, q * k], one scalar that nothing bounds: the sum of a
    user's weights says how strong the interest is. ``softmax=True`` makes the weights of a history sum to 1 instead,
    which the authors' code does and the paper argues against.

    The first layer never sees the four parts side by side. With its weight cut into [A, B, C, E],
    A q + B k + C (q - k) + E (q * k) = (A + C) q + (B - C) k + E (q * k): the first term once a sample, two products
    with (N, D) matrices instead of one with an (N, 4 D) one that would have to be written first.

    Args:
        width: D.
        hidden_layers: widths of the hidden layers. The paper has one of 36 (figure 2), the authors' code 80 and 40;
            time is in proportion to the first.
        activation: of the hidden layers; Dice is the paper's best, its statistics are those of all events of a batch.
        softmax: see above.

    Raises:
        ValueError: a width below 1, no hidden layer, another activation.

    Differs from the paper: its "out product" is the elementwise product, as in the authors' code, whose difference
    q - k is kept too.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden_layers: Sequence[int] = (36,),
        activation: Activation = "dice",
        softmax: bool = False,
    ) -> None:
        super().__init__()
        if width < 1 or not hidden_layers:
            raise ValueError(f"an activation unit needs a width and a hidden layer, got {width}, {list(hidden_layers)}")
        self.width = width
        self.softmax = softmax
        self.mlp = ActivatedMLP(4 * width, [*hidden_layers, 1], activation=activation)

    def forward(self, targets_BD: Tensor, events_ND: Tensor, offsets: Tensor) -> Tensor:
        """Weighted sum of each history: (B, D); zeros where it is empty.

        Args:
            targets_BD: (B, D).
            events_ND: (N, D), history after history.
            offsets: (B + 1,) int64 first event of each history.
        """
        segments = segments_of(offsets, events_ND.shape[0])
        return weighted_sum(events_ND, self._weights(targets_BD, events_ND, segments, offsets), segments, offsets)

    def weights(self, targets_BD: Tensor, events_ND: Tensor, offsets: Tensor) -> Tensor:
        """(N,) weight of each event; arguments as for ``forward``."""
        return self._weights(targets_BD, events_ND, segments_of(offsets, events_ND.shape[0]), offsets)

    def _weights(self, targets_BD: Tensor, events_ND: Tensor, segments: Tensor, offsets: Tensor) -> Tensor:
        first = cast(nn.Linear, self.mlp[0])
        of_target, of_event, of_difference, of_product = first.weight.split(self.width, dim=1)
        once = torch.addmm(first.bias, targets_BD, (of_target + of_difference).t())
        hidden = pair_products(once, targets_BD, events_ND, of_event - of_difference, of_product, segments, offsets)
        for layer in list(self.mlp)[1:]:
            hidden = layer(hidden)
        # Under autocast the MLP gives bfloat16, the events float32.
        scores = hidden.squeeze(1).to(events_ND.dtype)
        return segment_softmax(scores, segments, offsets) if self.softmax else scores
