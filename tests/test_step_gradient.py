"""The step and its long-tailed estimator."""

from __future__ import annotations

import pytest
import torch

from recemb.step_gradient import LongTailedStep


def test_the_step_is_strict() -> None:
    values = torch.tensor([-1.0, -1e-30, 0.0, 1e-30, 1.0])
    assert LongTailedStep.apply(values).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_at_the_published_points(sign: int) -> None:
    values = (sign * torch.tensor([0.0, 0.2, 0.4, 0.7, 1.0, 1.01], dtype=torch.float64)).requires_grad_()
    LongTailedStep.apply(values).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([2.0, 1.2, 0.4, 0.4, 0.4, 0.0], dtype=torch.float64))


def test_gradient_scales_what_arrives() -> None:
    values = torch.tensor([0.1, -0.1, 2.0], requires_grad=True)
    (LongTailedStep.apply(values) * torch.tensor([3.0, -1.0, 5.0])).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([4.8, -1.6, 0.0]))
