from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.models.dlrm import InteractionArch
from torchrec.modules.crossnet import LowRankCrossNet as TorchRecCrossNet

from recemb.models.layers import MLP, DotInteraction, LowRankCrossNet
from tests.models.tables import normal


def dots_by_loop(vectors: torch.Tensor) -> torch.Tensor:
    """The definition: the dot product of vectors i and j, i over rows, j over 0 .. i - 1."""
    return torch.stack(
        [
            torch.stack([(sample[i] * sample[j]).sum() for i in range(len(sample)) for j in range(i)])
            for sample in vectors
        ]
    )


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 4), num_vectors=st.integers(2, 9), dim=st.integers(1, 6), seed=st.integers(0, 9))
def test_dot_interaction_and_its_gradient_equal_a_plain_loop(batch: int, num_vectors: int, dim: int, seed: int) -> None:
    vectors = normal(batch, num_vectors, dim, seed=seed, dtype=torch.float64).requires_grad_()
    weights = normal(batch, num_vectors * (num_vectors - 1) // 2, seed=seed + 1, dtype=torch.float64)
    layer = DotInteraction(num_vectors)
    got, expected = layer(vectors), dots_by_loop(vectors)
    torch.testing.assert_close(got, expected)
    got_gradient, expected_gradient = (
        torch.autograd.grad((out * weights).sum(), vectors)[0] for out in (got, expected)
    )
    torch.testing.assert_close(got_gradient, expected_gradient)


@pytest.mark.parametrize("batch", [0, 1, 255, 256, 257, 600])
def test_dot_interaction_of_batches_around_its_chunks_equals_the_whole_product(batch: int) -> None:
    vectors = normal(batch, 4, 3, dtype=torch.float64).requires_grad_()
    row, column = torch.tril_indices(4, 4, offset=-1)
    weights = normal(batch, 6, seed=1, dtype=torch.float64)
    got, expected = DotInteraction(4)(vectors), (vectors @ vectors.transpose(1, 2))[:, row, column]
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad((out * weights).sum(), vectors)[0] for out in (got, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_half_precision_dots_are_rounded_once() -> None:
    vectors = normal(5, 6, 32).bfloat16().requires_grad_()
    exact_vectors = vectors.detach().float().requires_grad_()
    pairs, exact = DotInteraction(6)(vectors), DotInteraction(6)(exact_vectors)
    assert torch.equal(pairs, exact.bfloat16())
    weights = normal(5, 15, seed=1).bfloat16()
    (gradient,) = torch.autograd.grad(pairs, vectors, weights)
    (exact_gradient,) = torch.autograd.grad(exact, exact_vectors, weights.float())
    assert torch.equal(gradient, exact_gradient.bfloat16())


def test_dot_interaction_passes_gradcheck() -> None:
    vectors = normal(3, 5, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(DotInteraction(5), (vectors,))


def test_dot_interaction_orders_pairs_row_by_row_of_the_lower_triangle() -> None:
    # Orthogonal vectors but for the one pair that is looked for.
    for position, (i, j) in enumerate([(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]):
        vectors = torch.eye(4)
        vectors[i] = vectors[j]
        expected = torch.zeros(1, 6)
        expected[0, position] = 1.0
        torch.testing.assert_close(DotInteraction(4)(vectors.unsqueeze(0)), expected)


def test_dot_interaction_gives_the_products_of_torchrec_in_its_own_order() -> None:
    batch, features, dim = 7, 5, 8
    dense, sparse = normal(batch, dim), normal(batch, features, dim, seed=1)
    torchrec_pairs = InteractionArch(num_sparse_features=features)(dense, sparse)[:, dim:]
    ours = DotInteraction(features + 1)(torch.cat([dense.unsqueeze(1), sparse], dim=1))
    column_of = {pair: k for k, pair in enumerate((j, i) for i in range(features + 1) for j in range(i))}
    upper = [column_of[(i, j)] for i in range(features + 1) for j in range(i + 1, features + 1)]
    torch.testing.assert_close(ours[:, upper], torchrec_pairs)


def test_compiler_form_of_the_dot_interaction_equals_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = normal(3, 6, 4).requires_grad_()
    layer = DotInteraction(6)
    eager = layer(vectors)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    other = layer(vectors)
    torch.testing.assert_close(other, eager)
    gradients = [torch.autograd.grad(out.square().sum(), vectors)[0] for out in (eager, other)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_dot_interaction_refuses_a_second_derivative_rather_than_give_a_wrong_one() -> None:
    vectors = normal(2, 3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(DotInteraction(3)(vectors).square().sum(), vectors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_dot_interaction_needs_two_vectors() -> None:
    with pytest.raises(ValueError, match="at least 2 vectors a sample, got 1"):
        DotInteraction(1)


def test_cross_network_equals_its_formula_and_torchrec() -> None:
    width, rank, num_layers = 10, 3, 2
    torch.manual_seed(0)
    layer = LowRankCrossNet(width, num_layers=num_layers, rank=rank)
    torchrec_layer = TorchRecCrossNet(width, num_layers, low_rank=rank)
    x_0 = normal(6, width)
    x = x_0
    with torch.no_grad():
        for k in range(num_layers):
            layer.up[k].bias.normal_()
            torchrec_layer.V_kernels[k].copy_(layer.down[k].weight)
            torchrec_layer.W_kernels[k].copy_(layer.up[k].weight)
            torchrec_layer.bias[k].copy_(layer.up[k].bias)
            projected = layer.up[k].weight @ (layer.down[k].weight @ x.T) + layer.up[k].bias[:, None]
            x = x_0 * projected.T + x
    torch.testing.assert_close(layer(x_0), x)
    torch.testing.assert_close(layer(x_0), torchrec_layer(x_0))


def test_cross_network_refuses_a_rank_of_zero() -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 10, 2 and 0"):
        LowRankCrossNet(10, num_layers=2, rank=0)


@pytest.mark.parametrize("relu_last", [True, False])
def test_mlp_equals_its_formula(relu_last: bool) -> None:
    torch.manual_seed(0)
    mlp = MLP(5, [7, 3], relu_last=relu_last)
    x = normal(4, 5)
    hidden = (x @ mlp[0].weight.T + mlp[0].bias).clamp(min=0)
    out = hidden @ mlp[2].weight.T + mlp[2].bias
    torch.testing.assert_close(mlp(x), out.clamp(min=0) if relu_last else out)


def test_mlp_starts_with_the_distributions_of_dlrm() -> None:
    torch.manual_seed(0)
    fan_in, fan_out = 300, 700
    layer = MLP(fan_in, [fan_out], relu_last=False)[0]
    weight_std, bias_std = math.sqrt(2 / (fan_in + fan_out)), math.sqrt(1 / fan_out)
    # A sample standard deviation of n values lies within 5 / sqrt(2 n) of the true one, all but surely.
    assert layer.weight.std().item() == pytest.approx(weight_std, rel=5 / math.sqrt(2 * fan_in * fan_out))
    assert layer.bias.std().item() == pytest.approx(bias_std, rel=5 / math.sqrt(2 * fan_out))
    assert abs(layer.weight.mean().item()) < 5 * weight_std / math.sqrt(fan_in * fan_out)
    # Normal, not uniform: 31.7% of the values lie beyond one standard deviation (42.3% of uniform ones).
    assert (layer.weight.abs() > weight_std).float().mean().item() == pytest.approx(0.317, abs=0.01)


@pytest.mark.parametrize(("in_features", "widths"), [(0, [4]), (4, []), (4, [8, 0])])
def test_mlp_refuses_empty_layers(in_features: int, widths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one layer of width >= 1"):
        MLP(in_features, widths, relu_last=True)
