from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recemb.models.attention import ActivationUnit
from recemb.models.dice import Dice
from recemb.models.jagged import segment_softmax, segment_sum, segments_of, spread, weighted_sum
from recemb.models.pairs import pair_products
from tests.models.tables import normal

LENGTHS = [3, 0, 1, 7, 0]


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def unit(width: int = 4, hidden_layers: Sequence[int] = (6, 5), **options) -> ActivationUnit:
    torch.manual_seed(1)
    module = ActivationUnit(width, hidden_layers=hidden_layers, **options)
    for layer in module.mlp:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.bias)
        if isinstance(layer, Dice):
            nn.init.normal_(layer.alpha)
    return module


def plain(module: ActivationUnit, targets: Tensor, events: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Weights and pooled vectors as the paper has them: event by event, [q, k, q - k, q * k] written out."""
    inputs, first = [], 0
    for target, length in zip(targets, lengths, strict=True):
        for event in events[first : first + length]:
            inputs.append(torch.cat([target, event, target - event, target * event]))
        first += length
    rows = torch.stack(inputs) if inputs else targets.new_zeros(0, 4 * targets.shape[1])
    scores = module.mlp(rows).squeeze(1)
    weights, pooled, first = [], [], 0
    for length in lengths:
        mine = scores[first : first + length]
        if module.softmax:
            mine = mine.exp() / mine.exp().sum()
        weights.append(mine)
        total = torch.zeros(targets.shape[1], dtype=targets.dtype)
        for weight, event in zip(mine, events[first : first + length], strict=True):
            total = total + weight * event
        pooled.append(total)
        first += length
    return torch.cat(weights), torch.stack(pooled)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ["dice", "prelu", "relu", "sigmoid"])
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [0, 0], [20, 20]], ids=["mixed", "one", "all empty", "full"])
@pytest.mark.parametrize("hidden_layers", [(6, 5), (7,)], ids=["two layers", "one layer"])
def test_equals_the_plain_form(
    lengths: list[int], activation, softmax: bool, training: bool, hidden_layers: tuple[int, ...]
) -> None:
    module = unit(activation=activation, softmax=softmax, hidden_layers=hidden_layers).double()
    module(normal(2, 4, dtype=torch.float64), 2 * normal(30, 4, seed=2, dtype=torch.float64), offsets_of([20, 10]))
    module.train(training)
    reference = copy.deepcopy(module)
    targets = normal(len(lengths), 4, dtype=torch.float64).requires_grad_()
    events = normal(sum(lengths), 4, seed=3, dtype=torch.float64).requires_grad_()
    weights, expected = plain(reference, targets, events, lengths)
    inputs = (targets, events)
    direction = normal(*expected.shape, seed=4, dtype=torch.float64)
    leaves = (*inputs, *reference.parameters())
    # Without events nothing depends on anything, and the gradients are zeros.
    nothing = sum(leaf.sum() * 0 for leaf in leaves)
    wanted = torch.autograd.grad((expected * direction).sum() + nothing, leaves)
    found = module(*inputs, offsets_of(lengths))
    gradients = torch.autograd.grad((found * direction).sum(), (*inputs, *module.parameters()))
    torch.testing.assert_close(found, expected)
    for name, a, b in zip(["targets", "events", *dict(module.named_parameters())], gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    for a, b in zip(module.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(module.weights(*inputs, offsets_of(lengths)), weights)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ["dice", "prelu"])
@pytest.mark.parametrize("hidden_layers", [(6, 5), (7,)], ids=["two layers", "one layer"])
@pytest.mark.parametrize("lengths", [[3, 0, 1], [8, 8, 8]], ids=["jagged", "equal"])
def test_gradients_by_finite_differences(
    lengths: list[int], activation, softmax: bool, hidden_layers: tuple[int, ...]
) -> None:
    module = unit(3, activation=activation, softmax=softmax, hidden_layers=hidden_layers).double()
    names = [name for name, _ in module.named_parameters()]
    parameters = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    targets = normal(3, 3, dtype=torch.float64).requires_grad_()
    events = normal(sum(lengths), 3, seed=5, dtype=torch.float64).requires_grad_()

    def run(q: Tensor, k: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (q, k, offsets_of(lengths)))

    assert torch.autograd.gradcheck(run, (targets, events, *parameters))


def test_pair_products_of_equal_histories_are_those_of_the_same_among_others() -> None:
    num_samples, length, width, units = 3, 9, 4, 5
    num_events = num_samples * length
    drawn = [normal(num_samples + 1, units), normal(num_samples + 1, width, seed=1), normal(num_events + 1, width)]
    weights = [normal(units, width, seed=seed) for seed in (3, 4)]
    direction = normal(num_events, units, seed=5)

    def run(lengths: list[int]) -> list[Tensor]:
        rows = [len(lengths), len(lengths), sum(lengths)]
        inputs = [values[:count] for values, count in zip(drawn, rows, strict=True)]
        leaves = [values.clone().requires_grad_() for values in (*inputs, *weights)]
        offsets = offsets_of(lengths)
        products = pair_products(*leaves, segments_of(offsets, sum(lengths)), offsets)[:num_events]
        once, targets, events, *others = torch.autograd.grad((products * direction).sum(), leaves)
        return [products, once[:num_samples], targets[:num_samples], events[:num_events], *others]

    # One more sample, of one event, makes the batch jagged, and nothing flows back from it.
    for a, b in zip(run([length] * num_samples), run([*[length] * num_samples, 1]), strict=True):
        torch.testing.assert_close(a, b)


def test_softmax_weights_of_a_history_sum_to_one_at_any_size_of_score() -> None:
    scores = torch.tensor([1000.0, 1001.0, -1000.0, 5.0])
    offsets = offsets_of([3, 0, 1])
    weights = segment_softmax(scores, segments_of(offsets, 4), offsets)
    e = math.e
    torch.testing.assert_close(weights, torch.tensor([1 / (1 + e), e / (1 + e), 0.0, 1.0]))


def test_without_softmax_a_longer_history_of_the_same_item_weighs_more() -> None:
    module = unit(activation="prelu").eval()
    target, event = normal(1, 4), normal(1, 4, seed=1)
    one = module(target, event, offsets_of([1]))
    three = module(target, event.expand(3, 4), offsets_of([3]))
    torch.testing.assert_close(three, 3 * one)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 10**6))
def test_evaluation_knows_no_batch(lengths: list[int], seed: int) -> None:
    module = unit().eval()
    targets, events = normal(len(lengths), 4, seed=seed), normal(sum(lengths), 4, seed=seed + 1)
    together = module(targets, events, offsets_of(lengths))
    first = 0
    for row, length in enumerate(lengths):
        alone = module(targets[row : row + 1], events[first : first + length], offsets_of([length]))
        torch.testing.assert_close(alone[0], together[row])
        first += length


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 10**6))
def test_segment_operations_equal_loops(lengths: list[int], seed: int) -> None:
    offsets = offsets_of(lengths)
    segments = segments_of(offsets, sum(lengths))
    values, weights = normal(sum(lengths), 3, seed=seed), normal(sum(lengths), seed=seed + 1)
    owners = [row for row, length in enumerate(lengths) for _ in range(length)]
    assert segments.tolist() == owners
    sums, weighted = torch.zeros(len(lengths), 3), torch.zeros(len(lengths), 3)
    for entry, owner in enumerate(owners):
        sums[owner] += values[entry]
        weighted[owner] += weights[entry] * values[entry]
    torch.testing.assert_close(segment_sum(values, segments, offsets), sums)
    torch.testing.assert_close(weighted_sum(values, weights, segments, offsets), weighted)
    assert torch.equal(spread(sums, segments, offsets), sums[owners])


def test_unusable_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"needs a width and a hidden layer, got 4, \[\]"):
        ActivationUnit(4, hidden_layers=[])
