"""AutoDim against a plain loop, its temperature, and the choice of candidates against a search of all combinations."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recemb.budget import BudgetOutOfReach
from recemb.collection import CompressedEmbeddingBagCollection
from recemb.memory import estimate_memory
from recemb.method import frozen_tables
from recemb.methods.autodim import AutoDim, choose_candidates
from recemb.methods.mixed_dimension import MixedDimension
from tests.embedding_cases import KEYS, MULTI_HOT, SINGLE, bags, pool_plainly, small_tables, table
from tests.methods.plain import group_of, rows_of

CANDIDATES = [2, 4, 8]
STARTS = {"t_ad": 0, "t_item": 4000, "t_site": 10_000, "t_one": 10_500}
OWNERS = dict(zip(KEYS, ["t_ad", "t_item", "t_item", "t_site", "t_one"], strict=True))
MEANS = [False, True, True, False, False]


def build(anneal_steps: int = 20_000) -> tuple[CompressedEmbeddingBagCollection, AutoDim]:
    """With an architecture, biases and running statistics as after some training."""
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(
        small_tables(), partial(AutoDim, candidates=CANDIDATES, anneal_steps=anneal_steps)
    )
    group = group_of(collection)
    assert isinstance(group, AutoDim)
    with torch.no_grad():
        group.architecture.normal_()
        group.biases.normal_()
        group.running_mean.normal_()
        group.running_var.uniform_(0.5, 2.0)
    return collection, group


def plain_batch(group: AutoDim, ids: list[list[list[int]]], probabilities: Tensor) -> Tensor:
    """Definition, id by id; in training normalised by the batch, all tables together."""
    owners = [config.name for config in small_tables()]
    occurrences = [(key, value) for key, feature in zip(KEYS, ids, strict=True) for bag in feature for value in bag]
    total: dict[tuple[str, int], Tensor] = {}
    for number, width in enumerate(CANDIDATES):
        projected = {}
        for key, value in occurrences:
            index = owners.index(OWNERS[key])
            row = rows_of(group, 0, number)[STARTS[OWNERS[key]] + value][:width]
            projected[key, value] = row @ group.projections[number][index].detach() + group.biases[number, index]
        batch = torch.stack([projected[occurrence] for occurrence in occurrences]).detach()
        mean, variance = (
            (batch.mean(dim=0), batch.var(dim=0, unbiased=False))
            if group.training
            else (group.running_mean[number], group.running_var[number])
        )
        for key, value in set(occurrences):
            index = owners.index(OWNERS[key])
            normalised = (projected[key, value] - mean) / (variance + 1e-5).sqrt()
            part = probabilities[index, number] * group.scales[index] * normalised
            total[key, value] = total.get((key, value), torch.zeros(8)) + part.detach()
    vectors = {
        key: {value: total[own, value] for own, value in total if own == key} or {0: torch.zeros(8)} for key in KEYS
    }
    return pool_plainly(vectors, ids, MEANS)


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_vectors_equal_the_mix_of_normalised_projections(ids: list[list[list[int]]], training: bool) -> None:
    collection, group = build()
    collection.train(training)
    probabilities = group.probabilities().detach()
    if not training:
        torch.testing.assert_close(probabilities, group.architecture.softmax(dim=1).detach())
    expected = plain_batch(group, ids, probabilities)
    torch.testing.assert_close(collection(bags(KEYS, ids)).values(), expected, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_those_of_torchs_batch_normalisation() -> None:
    collection, group = build()
    norm = torch.nn.BatchNorm1d(8, affine=False)
    norm.running_mean, norm.running_var = group.running_mean[2].clone(), group.running_var[2].clone()
    rows = [
        rows_of(group, 0, 2)[STARTS[OWNERS[key]] + bag[0]] for key, own in zip(KEYS, SINGLE, strict=True) for bag in own
    ]
    owners = [config.name for config in small_tables()]
    index = [owners.index(OWNERS[key]) for key in KEYS for _ in range(3)]
    norm(torch.stack([row @ group.projections[2][i] + group.biases[2, i] for row, i in zip(rows, index, strict=True)]))
    collection(bags(KEYS, SINGLE))
    torch.testing.assert_close(group.running_mean[2], norm.running_mean)
    torch.testing.assert_close(group.running_var[2], norm.running_var)


def test_temperature_falls_in_a_line_to_a_hundredth() -> None:
    _, group = build(anneal_steps=100)
    values = {}
    for step in (0, 1, 50, 100, 500):
        group.after_step(step)
        values[step] = group.temperature()
    assert values == pytest.approx({0: 1.0, 1: 0.9901, 50: 0.505, 100: 0.01, 500: 0.01})


def test_probabilities_are_those_of_the_gumbel_softmax() -> None:
    """Over many steps the noisy maximum falls on each candidate as often as its probability says."""
    _, group = build(anneal_steps=1)
    expected = group.architecture.softmax(dim=1).detach()
    counts = torch.zeros_like(expected)
    for step in range(1, 2001):
        group.after_step(step)
        probabilities = group.probabilities().detach()
        torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(4))
        counts += torch.nn.functional.one_hot(probabilities.argmax(dim=1), 3)
    torch.testing.assert_close(counts / 2000, expected, rtol=0, atol=0.05)


def test_noise_follows_from_seed_and_step_and_is_another_in_architecture_steps() -> None:
    collection, group = build()
    first = group.probabilities()
    torch.rand(10)
    assert torch.equal(group.probabilities(), first)
    with frozen_tables(collection):
        assert not torch.equal(group.probabilities(), first)
    group.after_step(1)
    assert not torch.equal(group.probabilities(), first)


def test_architecture_gets_the_gradient_of_the_plain_expression() -> None:
    collection, group = build()
    collection.eval()
    target = torch.randn(3, 40)
    (collection(bags(KEYS, SINGLE)).values() * target).sum().backward()
    gradient = group.architecture.grad
    assert gradient is not None
    for position in itertools.product(range(4), range(3)):
        step = torch.zeros(4, 3)
        step[position] = 1e-2
        losses = []
        for sign in (1, -1):
            probabilities = (group.architecture.detach() + sign * step).softmax(dim=1)
            losses.append(float((plain_batch(group, SINGLE, probabilities) * target).sum()))
        assert float(gradient[position]) == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=2e-2, abs=1e-3)


def test_plan_takes_the_likeliest_widths_and_builds_them() -> None:
    _, group = build()
    with torch.no_grad():
        group.architecture.copy_(torch.tensor([[0.0, 1.0, 0.5], [2.0, 1.0, 0.5], [0.0, 1.0, 3.0], [5.0, 0.0, 0.0]]))
    plan = group.derive_plan(None)
    assert plan.options == {"widths": {"t_ad": 4, "t_item": 2, "t_site": 8, "t_one": 2}}
    assert {name: int(part.mask()[0].sum()) for name, part in plan.tables.items()} == plan.options["widths"]
    method = AutoDim.from_plan(plan)
    built = group_of(CompressedEmbeddingBagCollection(small_tables(), method))
    assert isinstance(built, MixedDimension)
    # A projection of a table of one row would take more than the row.
    assert built.widths == [4, 2, 8, 8]


def test_plan_meets_a_budget_of_bytes() -> None:
    _, group = build()
    with torch.no_grad():
        group.architecture.copy_(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.1], [0.0, 1.0, 2.2], [0.0, 1.0, 2.3]]))
    for budget in (90_000, 150_000, 200_000, 300_000):
        widths = group.derive_plan(budget).options["widths"]
        reached = estimate_memory(small_tables(), partial(MixedDimension, widths=widths)).serving_bytes
        assert reached <= budget
    with pytest.raises(BudgetOutOfReach, match=r"tables of width 2 take 84,264 bytes; give a narrower candidate"):
        group.derive_plan(84_263)
    # Before anything is trained.
    with pytest.raises(BudgetOutOfReach, match=r"tables of width 2 take 84,264 bytes; give a narrower candidate"):
        group.begin_training(100, 84_263)
    group.begin_training(100, 84_264)
    group.begin_training(100, None)


@settings(max_examples=50)
@given(st.data())
def test_choice_is_within_budget_and_close_to_the_best_of_all_combinations(data: st.DataObject) -> None:
    num_tables = data.draw(st.integers(1, 4))
    scores = [data.draw(st.lists(st.floats(-5, 0), min_size=3, max_size=3)) for _ in range(num_tables)]
    sizes = [data.draw(st.integers(1, 50)) for _ in range(num_tables)]
    costs = [[size * width for width in (2, 4, 8)] for size in sizes]
    budget = data.draw(st.integers(2 * sum(sizes), 8 * sum(sizes)))
    chosen = choose_candidates(scores, costs, budget)
    assert sum(cost[index] for cost, index in zip(costs, chosen, strict=True)) <= budget
    best = max(
        math.fsum(row[index] for row, index in zip(scores, choice, strict=True))
        for choice in itertools.product(range(3), repeat=num_tables)
        if sum(cost[index] for cost, index in zip(costs, choice, strict=True)) <= budget
    )
    # Lagrange's bound: no more than what one table can gain is lost.
    spread = max(max(row) - min(row) for row in scores)
    assert math.fsum(row[index] for row, index in zip(scores, chosen, strict=True)) >= best - spread - 1e-9


def test_candidates_above_the_dimension_are_left_out() -> None:
    assert AutoDim([table("a", 10)], candidates=[2, 8, 16]).candidates == [2, 8]


@pytest.mark.parametrize("candidates", [[], [4, 2], [3, 4], [2, 2], [12]])
def test_candidates_that_cannot_be_stored_are_refused(candidates: list[int]) -> None:
    with pytest.raises(ValueError, match="candidates must be ascending, out of"):
        AutoDim([table("a", 10)], candidates=candidates)


def test_folded_tables_are_the_vectors_of_evaluation() -> None:
    collection, group = build()
    folded = group.folded_tables()
    assert group.training
    output = collection.eval()(bags(KEYS, SINGLE))
    for key, feature in zip(KEYS, SINGLE, strict=True):
        expected = folded[OWNERS[key]][[bag[0] for bag in feature]]
        torch.testing.assert_close(output[key], expected, rtol=1e-5, atol=1e-6)
    assert group.stored_tables() == {}


def test_progress_shows_the_mean_width_over_ids() -> None:
    _, group = build()
    with torch.no_grad():
        group.architecture.copy_(torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [0, 0, 9]]))
    expected = (4000 * 2 + 6000 * 4 + 500 * 8 + 8) / 10_501
    assert group.search_figures() == {"mean_dim": pytest.approx(expected)}
