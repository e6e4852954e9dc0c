"""The global magnitude threshold: as many values as asked for, the largest, over all tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recemb.budget import BudgetOutOfReach
from recemb.magnitude import magnitude_plan
from recemb.plan import CompressionPlan
from recemb.pruned_bytes import plan_bytes


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(300, 8, generator=generator),
        "faint": torch.randn(500, 8, generator=generator) * 1e-3,
    }


@pytest.mark.parametrize("percentile", [0.0, 37.5, 90.0, 99.9])
def test_number_of_values_is_exact_at_a_percentile(percentile: float) -> None:
    flat = np.concatenate([part.numpy().ravel() for part in values().values()])
    kept = round(len(flat) * (1 - percentile / 100))
    plan = magnitude_plan(values(), kept, source="test", size=CompressionPlan.num_values)
    assert plan.num_values() == kept
    # Those of numpy's order, over both tables.
    smallest = np.sort(np.abs(flat))[len(flat) - kept]
    for name, part in values().items():
        assert torch.equal(plan.tables[name].mask(), part.abs() >= float(smallest))


def test_values_of_equal_size_go_or_stay_together() -> None:
    tables = {"t": torch.tensor([[1.0, -1.0, 2.0, 0.0]])}
    plan = magnitude_plan(tables, 2, source="test", size=CompressionPlan.num_values)
    assert plan.tables["t"].mask().tolist() == [[False, False, True, False]]


def test_without_a_budget_only_zeros_go() -> None:
    plan = magnitude_plan({"t": torch.tensor([[1e-30, 0.0, -0.0, -5.0]])}, None, source="test")
    assert plan.tables["t"].mask().tolist() == [[True, False, False, True]]
    assert plan.source == "test"


def test_bytes_of_the_converted_tables_meet_the_budget_closely() -> None:
    budget = 800 * 8 * 4 // 5
    plan = magnitude_plan(values(), budget, source="test")
    assert 0.97 * budget < plan_bytes(plan) <= budget


def test_budget_below_empty_tables_is_refused() -> None:
    with pytest.raises(BudgetOutOfReach, match="cannot be met: empty tables take 2 bytes"):
        magnitude_plan(values(), 1, source="test", size=lambda plan: plan.num_values() + 2)
