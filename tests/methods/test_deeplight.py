"""DeepLight's schedule and its prunings, plain, fused and under a budget."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from recemb.collection import CompressedEmbeddingBagCollection, compressed_groups
from recemb.methods.deeplight import DeepLight
from recemb.optimizers import EmbeddingOptimizer
from recemb.preparation import prepare
from recemb.pruned_bytes import plan_bytes
from tests.embedding_cases import KEYS, MULTI_HOT, bags, small_tables

VALUES = (4000 + 6000 + 500 + 1) * 8


def build(**options: object) -> CompressedEmbeddingBagCollection:
    torch.manual_seed(0)
    return CompressedEmbeddingBagCollection(small_tables(), partial(DeepLight, **options))


def nonzero(collection: torch.nn.Module) -> int:
    [group] = compressed_groups(collection)
    return sum(int(torch.count_nonzero(rows)) for rows in group.stored_tables().values())


def test_schedule_is_the_papers_at_its_number_of_steps() -> None:
    [group] = compressed_groups(build(kept_fraction=0.1, steps_to_target=68_732))
    for step in (1, 100, 5000, 68_732, 200_000):
        assert group.progress(step) == pytest.approx(1 - 0.99 ** (step / 100), abs=1e-5)


def test_as_many_values_are_zero_as_the_schedule_says_and_they_are_the_smallest() -> None:
    collection = build(kept_fraction=0.25, steps_to_target=100)
    [group] = compressed_groups(collection)
    before = torch.cat(list(group.stored_tables().values())).abs()
    group.after_step(9)
    assert nonzero(collection) == VALUES
    group.after_step(10)
    dropped = int((1 - 0.001**0.1) * (VALUES - round(0.25 * VALUES)))
    assert VALUES - nonzero(collection) == dropped
    after = torch.cat(list(group.stored_tables().values())).abs()
    assert before[after == 0].max() < before[after > 0].min()
    assert torch.equal(after[after > 0], before[after > 0])


def test_it_prunes_inside_fused_kernels_and_what_was_dropped_may_grow_again() -> None:
    collection = build(kept_fraction=0.01, steps_to_target=10)
    model, optimizer = prepare(collection, EmbeddingOptimizer("sgd", 0.5), partial(torch.optim.SGD, lr=0.1))
    [group] = compressed_groups(model)
    features = bags(KEYS, MULTI_HOT)
    whole = int(model(features).values().count_nonzero())
    group.after_step(10)
    assert nonzero(model) == VALUES - int(0.999 * (VALUES - round(0.01 * VALUES)))
    assert model(features).values().count_nonzero() < whole / 3
    optimizer.zero_grad()
    model(features).values().sum().backward()
    optimizer.step()
    assert model(features).values().count_nonzero() == whole


def test_a_budget_ends_at_the_values_that_it_pays_for() -> None:
    collection = build(steps_to_target=1.0, every_steps=1)
    [group] = compressed_groups(collection)
    budget = VALUES * 4 // 10
    group.begin_training(40, budget)
    for step in range(1, 41):
        group.after_step(step)
    plan = group.derive_plan(budget)
    assert 0.95 * budget < plan_bytes(plan) <= budget
    # What the last cut takes is next to nothing: training saw the tables that are served.
    assert nonzero(collection) < 1.1 * plan.num_values() + 0.001 * VALUES


def test_without_a_budget_the_plan_keeps_the_fraction() -> None:
    [group] = compressed_groups(build(kept_fraction=0.125))
    assert group.derive_plan(None).num_values() == VALUES // 8


def test_a_run_goes_on_with_what_it_aimed_at() -> None:
    first, second = build(steps_to_target=1.0, every_steps=1), build(steps_to_target=1.0, every_steps=1)
    budget = VALUES * 4 // 10
    [group], [again] = compressed_groups(first), compressed_groups(second)
    for part in (group, again):
        part.begin_training(40, budget)
    for step in range(1, 21):
        group.after_step(step)
    second.load_state_dict(first.state_dict())
    for step in range(21, 41):
        group.after_step(step)
        again.after_step(step)
    assert all(torch.equal(first.state_dict()[key], tensor) for key, tensor in second.state_dict().items())


def test_validations_count_once_it_is_pruned() -> None:
    [group] = compressed_groups(build(kept_fraction=0.5, steps_to_target=0.5, every_steps=10))
    group.begin_training(100, None)
    settled = []
    for step in range(1, 101):
        group.after_step(step)
        settled.append(group.settled)
    assert settled == [False] * 49 + [True] * 51


def test_what_it_must_be_told() -> None:
    with pytest.raises(ValueError, match=r"give embedding.budget .* or method.kept_fraction; got None bytes and None"):
        compressed_groups(build())[0].begin_training(10, None)
    with pytest.raises(ValueError, match=r"got 100 bytes and 0.5"):
        compressed_groups(build(kept_fraction=0.5))[0].begin_training(10, 100)
    with pytest.raises(ValueError, match=r"steps_to_target=0.5 is a share of a training: call begin_training"):
        compressed_groups(build(kept_fraction=0.5))[0].after_step(10)
    for options, message in (
        ({"kept_fraction": 0.0}, r"kept_fraction must be in \(0, 1\], got 0.0"),
        ({"steps_to_target": 0}, "steps_to_target must be steps or a share"),
        ({"steps_to_target": 1.5}, "steps_to_target must be steps or a share"),
        ({"every_steps": 0}, "every_steps must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)
