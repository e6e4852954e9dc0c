from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.models.activations import ActivatedMLP, make_activation
from recemb.models.dice import Dice
from tests.models.tables import normal


def dice_by_hand(rows: list[list[float]], means, variances, alphas, eps: float) -> list[list[float]]:
    """The paper's formula, number by number."""
    output = []
    for row in rows:
        values = []
        for s, mean, variance, alpha in zip(row, means, variances, alphas, strict=True):
            p = 1 / (1 + math.exp(-(s - mean) / math.sqrt(variance + eps)))
            values.append(p * s + (1 - p) * alpha * s)
        output.append(values)
    return output


def dice(units: int, *, momentum: float = 0.01) -> Dice:
    module = Dice(units, momentum=momentum)
    with torch.no_grad():
        module.alpha.copy_(normal(units, seed=7) / 2)
    return module


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_dice_in_training_uses_the_statistics_of_the_batch(rows: int) -> None:
    module, inputs = dice(3), 2 * normal(rows, 3) + 1
    means = [sum(column) / rows for column in inputs.t().tolist()]
    variances = [
        sum((value - mean) ** 2 for value in column) / rows
        for column, mean in zip(inputs.t().tolist(), means, strict=True)
    ]
    expected = dice_by_hand(inputs.tolist(), means, variances, module.alpha.tolist(), module.eps)
    # One row has no variance: it is then divided by sqrt(eps), 1e-4, and so are the rounding errors.
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if rows == 1 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(module(inputs), torch.tensor(expected), **tolerance)


def test_bfloat16_inputs_are_normalised_in_float32() -> None:
    module, inputs = Dice(3), 2 * normal(40, 3) + 100
    output = module(inputs.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(module.running_mean, inputs.bfloat16().float().mean(0))


def test_dice_in_evaluation_uses_running_statistics_row_by_row() -> None:
    module = dice(3)
    for seed in range(4):
        module(normal(50, 3, seed=seed) * 3 + 2)
    module.eval()
    inputs = normal(6, 3, seed=9)
    expected = dice_by_hand(
        inputs.tolist(), module.running_mean.tolist(), module.running_variance.tolist(), module.alpha.tolist(), 1e-8
    )
    found = module(inputs)
    torch.testing.assert_close(found, torch.tensor(expected))
    for row in range(6):
        assert torch.allclose(module(inputs[row : row + 1]), found[row : row + 1])


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=8), momentum=st.floats(0.01, 1.0), seed=st.integers(0, 99)
)
def test_running_statistics_are_those_of_all_rows_weighted_by_age(sizes: list[int], momentum: float, seed: int) -> None:
    module = Dice(2, momentum=momentum).double()
    generator = np.random.default_rng(seed)
    rows, weights = np.zeros((0, 2)), np.zeros(0)
    for size in sizes:
        batch = generator.normal(5, 2, (size, 2))
        module(torch.from_numpy(batch))
        if size:
            weights = np.concatenate([weights * (1 - momentum), np.full(size, momentum)])
            rows = np.concatenate([rows, batch])
    if weights.sum() == 0:
        assert module.running_mean.tolist() == [0, 0] and module.running_variance.tolist() == [1, 1]
        return
    mean = np.average(rows, axis=0, weights=weights)
    np.testing.assert_allclose(module.running_mean, mean, atol=1e-9)
    np.testing.assert_allclose(
        module.running_variance, np.average((rows - mean) ** 2, axis=0, weights=weights), atol=1e-9
    )


def test_a_small_last_batch_hardly_moves_the_running_statistics() -> None:
    module = Dice(1)
    for seed in range(20):
        module(normal(1000, 1, seed=seed))
    before = module.running_mean.clone()
    module(torch.full((2, 1), 100.0))
    assert float(module.running_mean - before) < 0.02


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_dice_by_finite_differences(training: bool) -> None:
    module = dice(2).double().train(training)
    # Not touched by gradcheck's many calls in training, which move the running statistics only.
    inputs = normal(5, 2, dtype=torch.float64).requires_grad_()
    alpha = module.alpha.detach().clone().requires_grad_()

    def run(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"alpha": a}, (x,))

    assert torch.autograd.gradcheck(run, (inputs, alpha))


def test_no_rows_in_training_leave_everything_as_it_was() -> None:
    module = Dice(2)
    output = module(torch.zeros(0, 2, requires_grad=True))
    assert output.shape == (0, 2)
    # Part of the graph all the same: other ranks wait for the gradient.
    output.sum().backward()
    assert module.alpha.grad is not None and not module.alpha.grad.any()
    assert module.running_rows == 0 and module.running_variance.tolist() == [1, 1]


def test_arguments_out_of_range_are_named() -> None:
    for arguments, message in (
        ({"num_units": 0}, "num_units must be at least 1, got 0"),
        ({"num_units": 1, "momentum": 0.0}, r"momentum must be in \(0, 1\], got 0"),
        ({"num_units": 1, "eps": 0.0}, "eps must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Dice(**arguments)
    with pytest.raises(ValueError, match="activation must be 'dice', 'prelu', 'relu' or 'sigmoid', got 'gelu'"):
        make_activation("gelu", 3)
    with pytest.raises(ValueError, match=r"all of width 1 or more, got \[3, 0\]"):
        ActivatedMLP(3, [0], activation="relu")


def test_prelu_has_a_slope_a_unit_and_the_last_layer_has_no_activation() -> None:
    mlp = ActivatedMLP(3, [5, 1], activation="prelu")
    assert [type(layer).__name__ for layer in mlp] == ["Linear", "PReLU", "Linear"]
    assert mlp[1].weight.shape == (5,)
