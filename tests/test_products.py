"""Blocked products against autograd's."""

from __future__ import annotations

import pytest
import torch

from recemb import products
from recemb.products import gated_product, weighted_sum


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last one shorter."""
    monkeypatch.setattr(products, "_BLOCK_VALUES", 24)


@pytest.mark.parametrize("num_others", [1, 2, 3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 20])
def test_products_and_their_gradients_are_autograd_s(num_others: int, gated: bool, num_rows: int) -> None:
    tensors = [torch.randn(num_rows, 4, dtype=torch.float64, requires_grad=True) for _ in range(1 + num_others)]
    gate = (torch.rand(num_rows, 1) > 0.4).double() if gated else None
    expected = tensors[0]
    for other in tensors[1:]:
        expected = expected * (other if gate is None else other * gate + 1 - gate)
    output = gated_product(tensors[0], tensors[1:], gate)
    torch.testing.assert_close(output, expected)
    factors = torch.randn(num_rows, 4, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * factors).sum(), tensors)
    gradients = torch.autograd.grad((output * factors).sum(), tensors)
    for gradient, each in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, each)


@pytest.mark.parametrize("num_terms", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [0, 1, 20])
def test_weighted_sums_and_their_gradients_are_autograd_s(num_terms: int, num_rows: int) -> None:
    terms = torch.randn(num_terms, num_rows, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(num_rows, num_terms, dtype=torch.float64, requires_grad=True)
    expected = torch.einsum("knd,nk->nd", terms, weights)
    output = weighted_sum(terms, weights)
    torch.testing.assert_close(output, expected)
    factors = torch.randn(num_rows, 4, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * factors).sum(), [terms, weights])
    gradients = torch.autograd.grad((output * factors).sum(), [terms, weights])
    for gradient, each in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, each)
