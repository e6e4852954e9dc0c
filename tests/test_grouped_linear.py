"""Grouped layers against a product a row."""

from __future__ import annotations

import pytest
import torch

from recemb.grouped_linear import grouped_linear, sort_by_group


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 5], [5, 0, 0], [1, 1, 3], [0, 0, 0]])
def test_every_row_takes_its_own_layer_and_gradients_are_autograd_s(counts: list[int]) -> None:
    torch.manual_seed(0)
    num_rows = sum(counts)
    inputs = torch.randn(num_rows, 4, requires_grad=True)
    weights, biases = torch.randn(3, 4, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    groups = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    factors = torch.randn(num_rows, 2)
    expected = torch.einsum("ni,nio->no", inputs, weights[groups]) + biases[groups]
    output = grouped_linear(inputs, weights, biases, counts)
    torch.testing.assert_close(output, expected)
    expected_gradients = torch.autograd.grad((expected * factors).sum(), [inputs, weights, biases])
    gradients = torch.autograd.grad((output * factors).sum(), [inputs, weights, biases])
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_positions_come_group_after_group_in_order() -> None:
    groups = torch.randint(0, 7, (10_001,))
    assert torch.equal(sort_by_group(groups), torch.argsort(groups, stable=True))
    assert sort_by_group(torch.empty(0, dtype=torch.int64)).numel() == 0
