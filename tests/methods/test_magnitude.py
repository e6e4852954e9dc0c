"""Magnitude pruning: full tables until its plan, which keeps the largest values or rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.collection import CompressedEmbeddingBagCollection, compressed_groups
from recemb.method import CompressedTables
from recemb.methods.magnitude import Magnitude
from recemb.pruned_bytes import plan_bytes
from tests.embedding_cases import KEYS, MULTI_HOT, SINGLE, bags, small_tables

FULL = (4000 + 6000 + 500 + 1) * 8 * 4


def build(unit: str = "values") -> tuple[CompressedEmbeddingBagCollection, CompressedTables]:
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(small_tables(), partial(Magnitude, unit=unit))
    [group] = compressed_groups(collection)
    return collection, group


@pytest.mark.parametrize("ids", [MULTI_HOT, SINGLE], ids=["multi-hot", "single"])
def test_its_tables_are_full_tables(ids: list[list[list[int]]]) -> None:
    collection, group = build()
    reference = EmbeddingBagCollection(tables=small_tables())
    rows = {name: bag.weight.detach() for name, bag in reference.embedding_bags.items()}
    assert group.seed_from(rows) == [table.name for table in small_tables()]
    features = bags(KEYS, ids)
    torch.testing.assert_close(collection(features).values(), reference(features).values(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ratio", [2, 10, 50])
def test_largest_values_within_the_budget_over_all_tables(ratio: int) -> None:
    _, group = build()
    plan = group.derive_plan(FULL // ratio)
    assert 0.97 * FULL // ratio < plan_bytes(plan) <= FULL // ratio
    values = torch.cat([part.abs() for part in group.stored_tables().values()])
    kept = torch.cat([table.mask() for table in plan.tables.values()])
    assert values[kept].min() > values[~kept].max()


def test_rows_of_the_largest_norm_are_kept_whole() -> None:
    _, group = build("rows")
    plan = group.derive_plan(FULL // 10)
    assert 0.97 * FULL // 10 < plan_bytes(plan) <= FULL // 10
    norms = torch.cat([part.norm(dim=1) for part in group.stored_tables().values()])
    kept = torch.cat([table.mask() for table in plan.tables.values()])
    assert torch.equal(kept.any(dim=1), kept.all(dim=1))
    assert norms[kept.any(dim=1)].min() > norms[~kept.any(dim=1)].max()


def test_it_has_no_size_of_its_own() -> None:
    _, group = build()
    with pytest.raises(ValueError, match=r"magnitude pruning has no size of its own: give embedding.budget"):
        group.derive_plan(None)
    with pytest.raises(ValueError, match="unit must be 'values' or 'rows', got 'blocks'"):
        build("blocks")
